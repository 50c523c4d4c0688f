"""ResNet-50 in Keras 3: that of ``keras.applications``, prepared for large batches."""

import keras


def resnet50(
    size: int,
    classes: int = 1000,
    norm: type[keras.layers.BatchNormalization] = keras.layers.BatchNormalization,
) -> keras.Model:
    """Build the network: images of ``size`` x ``size`` pixels to (batch, classes) logits.

    It has the stride in the 1 x 1 convolutions and biases, so 25,583,592 parameters to train
    for 1000 classes. The last scale of each block starts at zero (Goyal et al., "Accurate,
    large minibatch SGD", 2017).

    Args:
        size: height and width, 32 or more.
        classes: the number of logits.
        norm: the class of the normalisation, for example ``hvd.SyncBatchNormalization``.
    """
    last = keras.config.image_data_format() == "channels_last"
    model = keras.applications.ResNet50(
        weights=None,
        input_shape=(size, size, 3) if last else (3, size, size),
        classes=classes,
        classifier_activation=None,
    )
    if norm is not keras.layers.BatchNormalization:
        model = keras.models.clone_model(model, clone_function=lambda layer: _made(layer, norm))
    for layer in model.layers:
        if layer.name.endswith("_3_bn"):
            layer.gamma.assign(keras.ops.zeros_like(layer.gamma))
    return model


def _made(
    layer: keras.layers.Layer, norm: type[keras.layers.BatchNormalization]
) -> keras.layers.Layer:
    kind = norm if type(layer) is keras.layers.BatchNormalization else type(layer)
    return kind.from_config(layer.get_config())
