"""The lock of a folder of checkpoints."""

from checkpoint.errors import CheckpointError
from titan_shampoo import folder_lock


class FolderLock(folder_lock.FolderLock):
    """Keeps other runs out of a folder of checkpoints until it is released or the process ends."""

    error = CheckpointError
    remedy = "set checkpoint.folder or job.dump_folder"
