"""Global tensors for distributed checkpoints, of which each rank holds some chunks."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Offsets = tuple[int, ...]


class BlockTensor(torch.Tensor):
    """A global tensor of which this rank holds some chunks, as views of live memory.

    It implements the protocol by which torch.distributed.checkpoint saves and loads tensors that
    are neither plain nor DTensor. It exists only while a checkpoint is written or read, and has no
    arithmetic.

    Args:
        size: Global shape.
        chunks: This rank's parts by their first index; disjoint over all ranks.
        dtype: Dtype of all chunks, needed on ranks without a chunk.
    """

    chunks: dict[Offsets, Tensor]

    @staticmethod
    def __new__(
        cls: type["BlockTensor"],
        size: tuple[int, ...],
        chunks: dict[Offsets, Tensor],
        dtype: torch.dtype,
    ) -> "BlockTensor":
        """Create the wrapper, which has a shape and a dtype but no memory."""
        return torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(size), dtype=dtype, device=torch.device("cpu")
        )

    def __init__(
        self, size: tuple[int, ...], chunks: dict[Offsets, Tensor], dtype: torch.dtype
    ) -> None:
        self.chunks = chunks

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has no cls
        cls,
        func: object,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: object = None,
    ) -> "BlockTensor":
        """Detach and copy to CPU memory, for the staging of an asynchronous save."""
        aten = torch.ops.aten
        if func is aten.detach.default:
            return args[0]
        if func in (aten.new_empty.default, aten.clone.default, aten._to_copy.default):
            return args[0]._copied()
        raise NotImplementedError(
            f"{func} is not defined on BlockTensor, which is a view for checkpoints"
        )

    def _copied(self) -> "BlockTensor":
        chunks = {at: chunk.detach().to("cpu", copy=True) for at, chunk in self.chunks.items()}
        return BlockTensor(tuple(self.shape), chunks, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockTensor":
        return self._copied()

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's protocol
        return BlockTensor, (tuple(self.shape), self.chunks, self.dtype)

    def data_ptr(self) -> int:
        """Zero: the wrapper has no memory."""
        return 0

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """One item per chunk of this rank, for the save planner."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """This rank's chunks, for the load planner."""
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(chunk.shape))
            for offsets, chunk in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """The memory of one chunk."""
        assert index.offset is not None, "the save planner asked for a chunk without its offset"
        return self.chunks[tuple(index.offset)]

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an extra keyword
        return f"BlockTensor({tuple(self.shape)}, {self.dtype}, {len(self.chunks)} chunks here)"
