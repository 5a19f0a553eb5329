"""TensorFlow's own operations, for test_tensorflow.py: run by a Python that has TensorFlow and need not have us.

    python tensorflow_oracle.py FUNCTION INPUTS.npz OUTPUTS.npz

Images are (N, H, W, 3) float32 in [0, 1], as TensorFlow wants them.
"""

import sys
from collections.abc import Callable

import numpy as np
import tensorflow as tf

Arrays = dict[str, np.ndarray]

BY_IMAGE: dict[str, Callable[..., tf.Tensor]] = {
    "adjust_contrast": tf.image.adjust_contrast,
    "adjust_saturation": tf.image.adjust_saturation,
    "adjust_hue": tf.image.adjust_hue,
    "add_brightness": tf.image.adjust_brightness,
    "scale_brightness": lambda image, factor: image * factor,
}


def operations(inputs: Arrays) -> Arrays:
    """Each operation on each image with the factor of the image, clipped."""
    out = {}
    for name, function in BY_IMAGE.items():
        images = [function(*pair) for pair in zip(inputs["images"], inputs[name], strict=True)]
        out[name] = np.stack([tf.clip_by_value(image, 0.0, 1.0).numpy() for image in images])
    out["grey"] = tf.image.rgb_to_grayscale(inputs["images"]).numpy()
    return out


def blur(image: tf.Tensor, size: int, sigma: float) -> tf.Tensor:
    """Two depthwise convolutions with 'SAME' padding, the definition of SimCLR's blur."""
    x = tf.range(-(size // 2), size // 2 + 1, dtype=tf.float32)
    kernel = tf.exp(-(x**2) / (2.0 * sigma**2))
    kernel = tf.tile(tf.reshape(kernel / tf.reduce_sum(kernel), [-1, 1, 1, 1]), [1, 1, 3, 1])
    image = image[None]
    for one_way in (kernel, tf.transpose(kernel, [1, 0, 2, 3])):
        image = tf.nn.depthwise_conv2d(image, one_way, strides=[1, 1, 1, 1], padding="SAME")
    return image[0]


def chains(inputs: Arrays) -> Arrays:
    """The whole recipe for each image: ``sequences`` (N, 4) names the jitters in their order, by number."""
    brightness = "add_brightness" if inputs["additive"] else "scale_brightness"
    names = (brightness, "adjust_contrast", "adjust_saturation", "adjust_hue")
    out = []
    for i, image in enumerate(inputs["images"]):
        x = tf.constant(image)
        if inputs["flip"][i]:
            x = tf.image.flip_left_right(x)
        if inputs["jitter"][i]:
            for operation in inputs["sequences"][i]:
                x = tf.clip_by_value(BY_IMAGE[names[operation]](x, inputs["factors"][i, operation]), 0.0, 1.0)
        if inputs["grey"][i]:
            x = tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(x))
        x = tf.clip_by_value(x, 0.0, 1.0)
        if inputs["blur"][i]:
            x = tf.clip_by_value(blur(x, int(inputs["kernel"]), float(inputs["sigma"][i])), 0.0, 1.0)
        out.append(x.numpy())
    return {"images": np.stack(out)}


def boxes(inputs: Arrays) -> Arrays:
    """(N, 4) top, left, height, width of ``sample_distorted_bounding_box`` as SimCLR calls it."""
    height, width = (int(side) for side in inputs["shape"])
    whole = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])

    def one(number: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.constant([height, width, 3]),
            bounding_boxes=whole,
            seed=tf.stack([number, 7]),
            min_object_covered=0.1,
            aspect_ratio_range=tuple(float(value) for value in inputs["ratio"]),
            area_range=tuple(float(value) for value in inputs["scale"]),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], size[:2]], 0)

    numbers = tf.data.Dataset.range(int(inputs["count"])).map(lambda number: one(tf.cast(number, tf.int32)))
    return {"boxes": np.concatenate(list(numbers.batch(1000).as_numpy_iterator()))}


if __name__ == "__main__":
    name, source, target = sys.argv[1:]
    with np.load(source) as loaded:
        given = dict(loaded)
    np.savez(target, **{"operations": operations, "chains": chains, "boxes": boxes}[name](given))
