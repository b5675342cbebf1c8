"""The directory of the store, and its files: nobody else can have planted them, and nothing that is opened can block.

A directory of one's own has mode 0700, and its files belong to nobody else. A shared one is made by whoever looks after
the machine; who may write in it is trusted with its content, but not with links and FIFOs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_READ_WRITE = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
_TRIES = 3


class StoreError(Exception):
    """The store cannot be used; the text says why, and what to do."""


class Directory:
    """The open directory, which a context manager closes."""

    def __init__(self, path: str, *, is_shared: bool, make: bool = False) -> None:
        """Open it, made with mode 0700 if `make` says so and it is not shared.

        Raises StoreError for one that is refused, FileNotFoundError for none, and other OSErrors.
        """
        self.path = path
        self._is_shared = is_shared
        if make and not is_shared and not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):  # another process makes it at the same time
                os.mkdir(path, stat.S_IRWXU)
        try:
            self._descriptor = os.open(path, _DIRECTORY)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise StoreError(f"{path}, the directory of the GPU store, is a link or a file: name another") from None
        self._found = os.fstat(self._descriptor)
        if not is_shared and (reason := self._not_own(self._found)):
            self.close()
            raise StoreError(f"{path}, the directory of the GPU store, {reason}")

    def _not_own(self, found: os.stat_result) -> str:
        """Say why it is not safe to take a file or directory for one's own; "" if it is."""
        if found.st_uid != os.geteuid():
            return f"belongs to user {found.st_uid}"
        mode = stat.S_IMODE(found.st_mode)
        return (
            f"has mode {mode:04o}, so others may have written there: remove it, or chmod it" if mode & _OTHERS else ""
        )

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def __enter__(self) -> Directory:  # noqa: PYI034 - typing.Self is there from Python 3.11 on
        """Give itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close it."""
        self.close()

    def open(self, name: str, flags: int, *, make: bool = False) -> int:
        """Open a regular file in it, made if `make` says so; raises what `__init__` raises.

        O_CREAT is used only where there is none: for another user's file in a sticky directory the kernel refuses it
        (fs.protected_regular, proc(5)).
        """
        for _ in range(_TRIES):  # others make it meanwhile, or a cleaner removes it
            with contextlib.suppress(FileNotFoundError):
                return self._checked(self._open(name, flags), name)
            if not make:
                break
            with contextlib.suppress(FileExistsError):
                self._make(name)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.path}/{name}")

    def _open(self, name: str, flags: int) -> int:
        try:
            return os.open(name, flags | _FILE, dir_fd=self._descriptor)
        except OSError as error:
            # A link gives ELOOP; a socket, or a FIFO that nobody reads, ENXIO.
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise
            raise StoreError(f"{self.path}/{name} is a link, or no file: remove it") from None

    def _checked(self, descriptor: int, name: str) -> int:
        found = os.fstat(descriptor)
        reason = "" if self._is_shared else self._not_own(found)
        if not stat.S_ISREG(found.st_mode):
            reason = "is no file: remove it"
        elif found.st_nlink > 1:
            reason = "has another name, which is another's file perhaps: remove it"
        if reason:
            os.close(descriptor)
            raise StoreError(f"{self.path}/{name} {reason}")
        if self._is_shared and found.st_uid == os.geteuid() and found.st_mode & self._mode() != self._mode():
            self._share(descriptor)
        return descriptor

    def _mode(self) -> int:
        """Give the mode of its files: others may read and write them in as far as they may the directory."""
        others = self._found.st_mode & _OTHERS_READ_WRITE if self._is_shared else 0
        return stat.S_IRUSR | stat.S_IWUSR | others

    def _share(self, descriptor: int) -> None:
        """Let others in, whatever the umask says; raises OSError."""
        if self._found.st_gid != os.fstat(descriptor).st_gid:
            with contextlib.suppress(PermissionError):  # the directory lacks the set-group-ID bit, and we are not in it
                os.fchown(descriptor, -1, self._found.st_gid)
        os.fchmod(descriptor, self._mode())

    def _make(self, name: str) -> None:
        if not (self._is_shared and self._make_at_once(name)):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE
            # Whoever is killed here leaves a file that is closed to others; it is opened by its owner's next use.
            os.close(os.open(name, flags, self._mode(), dir_fd=self._descriptor))

    def _make_at_once(self, name: str) -> bool:
        """Give a file its name only when it has its mode; False where the file system cannot (O_TMPFILE, open(2))."""
        try:
            descriptor = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, self._mode(), dir_fd=self._descriptor)
        except OSError:
            return False
        try:
            self._share(descriptor)
            os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=self._descriptor)
        except FileExistsError:
            raise
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)

    def is_called(self, descriptor: int, name: str) -> bool:
        """Say whether an open file still has its name, here and on the path by which others come."""
        try:
            found = os.stat(f"{self.path}/{name}", follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(descriptor))
