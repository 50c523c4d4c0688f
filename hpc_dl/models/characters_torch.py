"""A small transformer that predicts the next character of a text."""

import torch
from torch import Tensor, nn


class CharacterTransformer(nn.Module):
    """A decoder with causal attention, normalised before each layer.

    Radford et al., "Language models are unsupervised multitask learners", 2019, at a
    thousandth of the size.
    """

    def __init__(
        self,
        characters: int,
        context: int = 64,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
    ):
        """Build it with random weights.

        Args:
            characters: how many different ones there are.
            context: characters that it looks back on.
        """
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the next character at each place.

        Args:
            x: numbers of characters, shape (batch, length); length is at most the context.

        Returns:
            Shape (batch, length, characters).
        """
        length = x.shape[1]
        hidden = self.characters(x) + self.places(torch.arange(length, device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.logits(self.norm(hidden))
        return logits
