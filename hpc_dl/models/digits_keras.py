"""A small convolutional network for digits of 8 x 8 pixels, in Keras 3."""

import keras


def digits_cnn(classes: int = 10) -> keras.Model:
    """Build the network: (batch, 8, 8, 1) to (batch, classes) logits.

    Where Keras is set to channels_first, the images are (batch, 1, 8, 8).

    The same layers and sizes as the network of ``hpc_dl.models.digits_torch``.
    """
    last = keras.config.image_data_format() == "channels_last"
    return keras.Sequential(
        [
            keras.Input((8, 8, 1) if last else (1, 8, 8)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(classes),
        ]
    )
