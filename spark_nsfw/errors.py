"""Every error that spark_nsfw raises on purpose.

::

    SparkNsfwError
    ├── InputError (ValueError)         an argument or an input path that cannot work
    │   └── NothingToReadError          an input with nothing in it to read
    ├── StorageError (OSError)          a file that cannot be read or written now
    ├── WeightsError                    a weight file that cannot be used
    │   ├── WeightsUnavailableError     it could not be found or downloaded
    │   ├── ChecksumError               its sha256 is not the expected one
    │   └── WeightsMismatchError        its tensors do not fit the network
    ├── EmbeddingWidthError (ValueError)  embeddings and classifier differ in width
    ├── ShardError                      becomes the status of a shard's own row
    │   ├── ShardUnreadableError        the shard cannot be opened or read on
    │   └── ShardTruncatedError         the shard ends before its end-of-archive marker
    ├── ImageError                      becomes the status of a sample's row
    │   ├── UndecodableImageError       the bytes are no image that pillow opens
    │   └── OversizedImageError         the image is larger than the limit
    └── JobError                        the job cannot go on; what is written stays valid
        └── JobStoppedError             it was stopped
"""

from __future__ import annotations

__all__ = [
    "ChecksumError",
    "EmbeddingWidthError",
    "ImageError",
    "InputError",
    "JobError",
    "JobStoppedError",
    "NothingToReadError",
    "OversizedImageError",
    "ShardError",
    "ShardTruncatedError",
    "ShardUnreadableError",
    "SparkNsfwError",
    "StorageError",
    "UndecodableImageError",
    "WeightsError",
    "WeightsMismatchError",
    "WeightsUnavailableError",
]


class SparkNsfwError(Exception):
    """Base of every error in this package."""


class InputError(SparkNsfwError, ValueError):
    """An argument or an input path that cannot work."""


class NothingToReadError(InputError):
    """An input that does not exist, or has nothing in it to read."""


class StorageError(SparkNsfwError, OSError):
    """A file that cannot be read or written now: network, permission, credentials, disk.

    Nothing is known to be damaged, so no row is made of it; another try may succeed.
    """


class WeightsError(SparkNsfwError):
    """A weight file that cannot be used."""


class WeightsUnavailableError(WeightsError):
    """A weight file that could not be found or downloaded."""


class ChecksumError(WeightsError):
    """A weight file whose sha256 is not the expected one."""


class WeightsMismatchError(WeightsError):
    """A weight file whose tensors do not fit the network."""


class EmbeddingWidthError(SparkNsfwError, ValueError):
    """Embeddings of another width than the classifier was trained on."""


class ShardError(SparkNsfwError):
    """A fault of a whole shard."""


class ShardUnreadableError(ShardError):
    """A shard that cannot be opened, or not be read on."""


class ShardTruncatedError(ShardError):
    """A shard that ends before its end-of-archive marker."""


class ImageError(SparkNsfwError):
    """A fault of one image."""


class UndecodableImageError(ImageError):
    """Bytes that are no image pillow can decode in full."""


class OversizedImageError(ImageError):
    """An image of more bytes or pixels than the limit allows."""


class JobError(SparkNsfwError):
    """The job cannot go on; what it has written stays valid."""


class JobStoppedError(JobError):
    """The job was stopped; the next run continues from there."""
