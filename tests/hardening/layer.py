"""A layer over the file system in which one step goes wrong: the n-th write, rename, link or fsync below a folder.

    fail   it is not done, and the disk is said to be full
    cut    half of a write is done; another step is done whole; then the disk is said to fail
    kill   half of a write is done, another step not at all, and the process is gone (any signal)

Steps are counted below one folder alone. What Rust writes for safetensors is a step too, as one write; what it writes
for tokenizers is none.
"""
import builtins
import errno
import io
import os
import signal
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

WAYS = "fail", "cut", "kill"
NAMED = "replace", "rename", "link", "mkdir", "unlink", "truncate"  # functions of os whose first argument is a path


class Layer:
    "Counts the steps below a folder, and lets one of them go wrong."
    def __init__(self, folder, at=0, how="fail", sig=signal.SIGKILL):
        self.folder, self.at, self.how, self.sig = os.path.realpath(folder), at, how, sig
        self.count, self.steps = 0, []

    @property
    def met(self): return 0 < self.at <= self.count

    def counts(self, path):
        "Whether a path or an open file lies below the folder."
        try:
            if isinstance(path, int): path = os.readlink(f"/proc/self/fd/{path}")
            return os.path.realpath(os.fsdecode(path)).startswith(self.folder)
        except (OSError, TypeError, ValueError): return False

    def step(self, what, path, do, half=None):
        "Take a step, or what is to become of it."
        if not self.counts(path): return do()
        self.count += 1
        self.steps.append(f"{what} {path}")
        if self.count != self.at: return do()
        if half and self.how != "fail": half()
        if self.how == "kill":
            os.kill(os.getpid(), self.sig)  # another signal than SIGKILL may be handled
            return do()
        if self.how == "cut" and not half: do()
        raise OSError(errno.ENOSPC if self.how == "fail" else errno.EIO, "No space left on device")


class Cut:
    "A file whose writes are steps."
    def __init__(self, file, layer): self._file, self._layer = file, layer
    def __getattr__(self, name): return getattr(self._file, name)
    def __iter__(self): return iter(self._file)
    def __enter__(self): return self
    def __exit__(self, *_): self.close()

    def close(self): self._file.close()

    def write(self, content):
        def half():
            self._file.write(content[:len(content) // 2])
            self._file.flush()
        return self._layer.step("write", self._file.name, lambda: self._file.write(content), half)


def _opening(layer, real):
    def opening(file, mode="r", *args, **how):
        found = real(file, mode, *args, **how)
        return Cut(found, layer) if set(mode) & set("wxa+") and layer.counts(file) else found
    return opening


def _named(layer, name, real):
    def call(path, *args, **how):
        target = args[0] if args and name in ("replace", "rename", "link") else path
        return layer.step(name, target, lambda: real(path, *args, **how))
    return call


def _by_rust(layer, real):
    "safetensors' function that writes a file."
    from safetensors import SafetensorError
    def call(tensors, path, *args, **how):
        path = Path(path)
        def half():
            real(tensors, path, *args, **how)
            content = path.read_bytes()
            path.write_bytes(content[:len(content) // 2])
        try: return layer.step("write", path, lambda: real(tensors, path, *args, **how), half)
        except OSError as e: raise SafetensorError(f"I/O error: {e.strerror} (os error {e.errno})") from None
    return call


@contextmanager
def faults(folder, at=0, how="fail", sig=signal.SIGKILL):
    "A block in which the step number `at` below the folder goes wrong; 0: steps are only counted."
    import safetensors.torch
    layer = Layer(folder, at, how, sig)
    with ExitStack() as stack:
        def put(where, name, new): stack.enter_context(patch.object(where, name, new))
        put(io, "open", _opening(layer, io.open))
        put(builtins, "open", _opening(layer, builtins.open))
        for name in NAMED: put(os, name, _named(layer, name, getattr(os, name)))
        sync = os.fsync
        put(os, "fsync", lambda fd: layer.step("fsync", fd if isinstance(fd, int) else fd.fileno(), lambda: sync(fd)))
        real = safetensors.torch.serialize_file
        put(safetensors.torch, "serialize_file", _by_rust(layer, real))
        yield layer
