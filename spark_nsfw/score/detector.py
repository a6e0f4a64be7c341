"""What all detectors have in common: weights, a model on a device, columns of results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch

from spark_nsfw.errors import InputError, WeightsUnavailableError
from spark_nsfw.score.checkpoint import load_state_dict
from spark_nsfw.score.describing import is_foreign, public_attributes
from spark_nsfw.score.download import PublishedFile, Weights, download, file_sha256, local_file

__all__ = ["Detector", "TakesDetector"]


class TakesDetector(Protocol):
    """A dataset whose images can be scored, such as `spark_nsfw.ImageTextPairDataset`."""

    def with_classifier(self, classifier: Detector[Any]) -> Any:
        """The same dataset, scored."""


_Dataset = TypeVar("_Dataset", bound=TakesDetector)
_Model = TypeVar("_Model")


#: What decides where a score comes from and goes to, but not which it is.
_NOT_DESCRIBED = (
    "batch_size",
    "embedding_column",
    "model_name",
    "model_path",
    "models_dir",
    "num_threads_per_worker",
    "pred_type",
)


#: Python's and numpy's names of types → Arrow's, where they differ.
_TYPE_NAMES = {"int": "int64", "str_": "str", "object": "str", "bool_": "bool"}


class Detector(Generic[_Model]):
    """A model with weights of its own that adds one or more columns of results.

    `spark_nsfw.ImageClassifier` looks at embeddings, `spark_nsfw.PixelClassifier` at pixels.

    Args:
        model_name: for people, and the beginning of the column's name.
        pred_column: the column that the scores go to; None takes ``{model_name}_score``.
        pred_type: type of that column: ``float`` (float32), ``int``, ``str``, ``bool``, or
            the name of another Arrow type.
        batch_size: rows per forward pass; None takes what suits the device.
        model_path: file of its weights, a path or URL. Its sha256 is settled before a job
            starts, noted in the output, and checked by every worker.
        models_dir: directory or URL that `spark_nsfw.score.staging.fetch_models` made, from which
            published weights are taken instead of downloaded.

    Raises:
        InputError: a value that cannot work.
    """

    def __init__(
        self,
        model_name: str,
        pred_column: str | None,
        pred_type: Any,
        batch_size: int | None,
        model_path: str | None,
        models_dir: str | None,
    ) -> None:
        if batch_size is not None and (batch_size == 0 or batch_size < -1):
            raise InputError(f"batch_size is -1 or at least 1, not {batch_size}")
        self.model_name = model_name
        self.pred_column = pred_column or f"{model_name}_score"
        self.pred_type = pred_type
        self.batch_size = batch_size
        self.model_path = model_path
        self.models_dir = models_dir
        self._arrow_type = _arrow_type(pred_type)
        self._sha256: str | None = None
        self._is_ready = False
        self._models: dict[str, _Model] = {}

    def load_model(self, device: str) -> Any:
        """Load the network, ready to score, on ``device``."""
        raise NotImplementedError(f"{type(self).__name__} must define load_model")

    def model(self, device: str) -> _Model:
        """The network on ``device``, loaded once."""
        if device not in self._models:
            if self._sha256 is not None and is_foreign(self):
                self.weights_file()  # checked here, since its own code may just open the file
            self._models[device] = self._loaded(device)
        return self._models[device]

    def _loaded(self, device: str) -> _Model:
        model: _Model = self.load_model(device)
        return model

    def postprocess(self, series: pd.Series) -> pd.Series:
        """What goes to the column, from what the model gave.

        To be overridden where that is not the score itself, such as a label.

        Args:
            series: N numbers, or N arrays (K,) where the model gives (N, K).
                ``series.list.leaves`` is all of them in a row, as in cuDF.

        Returns:
            N values of ``pred_type``.
        """
        return series

    @property
    def result_fields(self) -> list[pa.Field]:
        """The columns that it adds."""
        return [pa.field(self.pred_column, self._arrow_type)]

    @property
    def result_columns(self) -> list[str]:
        """The names of `result_fields`."""
        return [field.name for field in self.result_fields]

    def columns(self, values: npt.NDArray[np.float32]) -> list[pa.Array]:
        """The model's results of N rows, as one Arrow array (N,) per result column.

        Args:
            values: float32 (N,) or (N, K).

        Raises:
            InputError: they do not fit the columns.
        """
        fields = self.result_fields
        if len(values) == 0:
            return [pa.nulls(0, field.type) for field in fields]
        if self._postprocesses:
            columns = [self.postprocess(_Values(list(values) if values.ndim > 1 else values))]
        else:
            columns = list(values.reshape(len(values), -1).T)
        try:
            return [
                pa.array(column, from_pandas=True).cast(field.type)
                for column, field in zip(columns, fields, strict=True)
            ]
        except (pa.ArrowException, ValueError) as exc:
            wanted = ", ".join(f"{field.name} ({field.type})" for field in fields)
            raise InputError(f"{type(self).__name__} does not give {wanted}: {exc}") from exc

    @property
    def _postprocesses(self) -> bool:
        return type(self).postprocess is not Detector.postprocess

    def _checked(self, values: torch.Tensor, num_rows: int) -> torch.Tensor:
        """What a model gave for some rows: float32 (N,) or (N, K).

        Raises:
            InputError: that is not as many as it has columns.
        """
        values = values.to(torch.float32)
        if values.shape == (num_rows, 1):
            values = values.reshape(-1)
        width = math.prod(values.shape[1:])
        if values.shape[:1] != (num_rows,) or not (
            self._postprocesses or width == len(self.result_fields)
        ):
            raise InputError(
                f"the model of {type(self).__name__} gives {tuple(values.shape[1:])} for an "
                f"image; it has {len(self.result_fields)} columns: {', '.join(self.result_columns)}"
            )
        return values

    @property
    def published_file(self) -> PublishedFile | None:
        """The weights it takes without ``model_path``; None where nobody publishes any."""
        return None

    def weights_file(self) -> Path | None:
        """The file of its weights, fetched if it must be and checked; None if it has none.

        Raises:
            WeightsUnavailableError: it cannot be had.
            ChecksumError: it is not the one that was settled or published.
        """
        if self.model_path is not None:
            return local_file(self.model_path, self._sha256)
        published = self.published_file
        if published is None:
            return None
        if self.models_dir is not None:
            url = f"{self.models_dir.rstrip('/')}/{published.file_name}"
            return local_file(url, published.sha256)
        return download(published.url, published.file_name, published.sha256)

    def weights_sha256(self) -> str | None:
        """The sha256 of its weights as they are now, in hex; None if it has none.

        Raises:
            WeightsUnavailableError: they cannot be had.
            ChecksumError: they are not those that were settled or published.
        """
        path = self.weights_file()
        return None if path is None else file_sha256(path)

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The tensors of `weights_file` by name, on the CPU; no pickle is executed.

        Raises:
            WeightsError: there is no file, or it cannot be had or read.
        """
        return load_state_dict(self._needed_file())

    def _needed_file(self) -> Path:
        """As `weights_file`, for a detector that cannot do without one."""
        path = self.weights_file()
        if path is None:
            raise WeightsUnavailableError(f"{type(self).__name__} has no file: give model_path")
        return path

    @property
    def weights(self) -> Weights | None:
        """Which file it scores with; None if it has none, or does not know yet which.

        The sha256 of a file of one's own is known once the detector is ready.
        """
        if self.model_path is not None:
            return Weights(self.model_path, self._sha256)
        published = self.published_file
        return None if published is None else Weights(published.url, published.sha256)

    def describe(self) -> dict[str, Any]:
        """What tells this detector from another, for caches and for provenance.

        By default its class, its public attributes, and its weights, whatever path they
        were read from. Looks at no file.

        Raises:
            InputError: an attribute is neither plain data nor can it be pickled.
        """
        attributes = public_attributes(self, _NOT_DESCRIBED)
        described: dict[str, Any] = {"classifier": type(self).__qualname__} | attributes
        weights = self.weights
        if weights is not None:
            described["weights"] = {"source": weights.source, "sha256": weights.sha256}
        return described

    @property
    def is_ready(self) -> bool:
        """Whether its weights were found, tried and are known by their sha256."""
        return self._is_ready

    def __call__(self, dataset: _Dataset) -> _Dataset:
        """The dataset with this detector's columns, computed when it is read or saved.

        Raises:
            InputError: it is no `ImageTextPairDataset`.
        """
        if not hasattr(dataset, "with_classifier"):
            raise InputError(f"expected an ImageTextPairDataset, not {type(dataset).__name__}")
        scored: _Dataset = dataset.with_classifier(self)
        return scored

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_models": {}}  # every process loads its own


class _Values(pd.Series):  # type: ignore[misc]
    """What `Detector.postprocess` is given: a pandas series that also answers like cuDF's."""

    @property
    def _constructor(self) -> Any:
        return pd.Series

    @property
    def list(self) -> _Lists:
        """Its rows as lists."""
        return _Lists(self)


class _Lists:
    """cuDF's ``Series.list``, as far as classifiers written for NeMo Curator need it."""

    def __init__(self, series: pd.Series) -> None:
        self._rows = [np.atleast_1d(row) for row in series]
        self._index = series.index

    @property
    def leaves(self) -> pd.Series:
        """All numbers in a row."""
        return pd.Series(np.concatenate(self._rows) if self._rows else [], dtype=np.float32)

    def get(self, position: int) -> pd.Series:
        """One number of each row."""
        return pd.Series([row[position] for row in self._rows], self._index)

    def len(self) -> pd.Series:
        """How many numbers each row has."""
        return pd.Series([len(row) for row in self._rows], self._index)


def _arrow_type(pred_type: Any) -> pa.DataType:
    """``float``, ``"int32"``, ``np.float64`` … → Arrow.

    Raises:
        InputError: it is no type of a column.
    """
    if isinstance(pred_type, pa.DataType):
        return pred_type
    name = pred_type
    for attribute in ("__name__", "name"):  # of a class, of a numpy dtype
        name = name if isinstance(name, str) else getattr(pred_type, attribute, None)
    try:
        return pa.type_for_alias(_TYPE_NAMES.get(str(name), str(name)))
    except ValueError as exc:
        raise InputError(
            f"pred_type is float, int, str, bool or the name of an Arrow type, not {pred_type!r}"
        ) from exc
