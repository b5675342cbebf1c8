"""The machine whose GPUs a test uses: a stand-in that the test scripts, or, by HARNESS_TEST_GPUS=real, its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.broker.nvml import Nvml
from harness.broker.readings import Reading
from harness.broker.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

_HERE = Path(__file__).parent
_SERVER = _HERE.parent / "servers" / "gpu_server.py"
_MIB = 1 << 20
IS_REAL = os.environ.get("HARNESS_TEST_GPUS") == "real"


def build(folder: Path, without: Sequence[str] = ()) -> Path:
    """Compile the stand-in, and give the library. `without`: functions that an older driver does not have."""
    library = folder / "libnvidia-ml.so.1"
    command = ["cc", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", "-pthread", "-o", str(library)]
    renamed = [f"-D{function}={function}_is_missing" for function in without]
    subprocess.run([*command, *renamed, str(_HERE / "standin.c"), "-ldl"], check=True, capture_output=True)
    return library


class Machine:
    """A machine with GPUs, as servers and the harness find it. `state_dir` is where the test's runs keep state."""

    def __init__(self, folder: Path, state_dir: Path) -> None:
        """Take the stand-in's directory."""
        self.folder = folder
        self.state_dir = state_dir

    @property
    def uuids(self) -> list[str]:
        """Give the UUIDs of the devices, in the order of the bus."""
        return [uuid for uuid, _, _ in self._devices()]

    @property
    def total_mib(self) -> int:
        """Give the memory of the first device."""
        return self._devices()[0][2]

    def _devices(self) -> list[tuple[str, str, int]]:
        lines = (self.folder / "devices").read_text(encoding="utf-8").splitlines()
        return [(line.split("|")[0], line.split("|")[1], int(line.split("|")[2])) for line in lines]

    def used_mib(self, uuid: str) -> int:
        """Give what is in use on a device now, read by a process of its own."""
        code = f"from harness.broker.nvml import Nvml; print(Nvml().read({uuid!r}).used_bytes)"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return int(done.stdout) // _MIB

    @staticmethod
    def server(*options: str) -> list[str]:
        """Give the command of a server that holds memory on each device that it sees."""
        return [sys.executable, str(_SERVER), "--port", "{port}", *options]

    @staticmethod
    def environment_of(pid: int) -> dict[str, str]:
        """Give the environment that a process was executed with."""
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)

    @staticmethod
    def book(state_dir: Path) -> dict[str, Any]:
        """Give the content of the store."""
        found = Store(str(state_dir / "gpu")).read()
        return found or {"leases": [], "waiters": [], "quarantines": {}, "baselines": {}}

    def stranger(self, uuid: str, mib: int) -> subprocess.Popen[bytes]:
        """Start a process that is nobody's and holds memory; give it once it does."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": uuid}
        command = [sys.executable, str(_SERVER), "--mib", str(mib), "--say"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process


class Standin(Machine):
    """The stand-in, which a test can script."""

    def __init__(self, folder: Path, state_dir: Path, count: int = 2, total_mib: int = 81920) -> None:
        """Begin with so many empty devices."""
        super().__init__(folder, state_dir)
        (folder / "holds").mkdir(parents=True)
        self.set_devices(
            [(f"GPU-{number:08x}-0000-4000-8000-000000000000", "Stand-in H100") for number in range(count)], total_mib
        )

    def set_devices(
        self, devices: Sequence[tuple[str, str]], total_mib: int = 81920, instances: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Set the devices, each a UUID and a name, and the MIG instances, each a UUID and the UUID of its GPU."""
        lines = [f"{uuid}|{name}|{total_mib}|480|\n" for uuid, name in devices]
        lines += [f"{uuid}|MIG 1g.10gb|9728|0|{parent}\n" for uuid, parent in instances]
        self._write("devices", "".join(lines))

    def hold(self, uuid: str, pid: int, mib: int, kind: str = "c") -> None:
        """Have a process hold memory; `kind` is some of c, g and m: compute, graphics, MPS."""
        start = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        self._write(f"holds/{uuid}.{pid}", f"{mib} {kind} {start} 0 0")

    def set_residue(self, uuid: str, mib: int) -> None:
        """Have memory held by nobody who is listed."""
        self._write(f"residue.{uuid}", str(mib))

    def fail(self, function: str, code: int, *, uuid: str = "any", count: int = -1, seconds: float = 0.0) -> None:
        """Have a function ("any": each that is called for `uuid`) fail; `count` -1 is each time.

        It blocks for `seconds` first.
        """
        self._write(f"fault.{function}.{uuid}", f"{code} {count} {seconds}")

    def mend(self, function: str, uuid: str = "any") -> None:
        """Have a function work again, also for those that it blocks."""
        (self.folder / f"fault.{function}.{uuid}").unlink()

    def mark(self, name: str) -> None:
        """Set a mark: blind, untold, restless, mig.UUID, or missing.FUNCTION."""
        (self.folder / name).touch()

    def set_driver(self, version: str) -> None:
        """Set the driver's version."""
        self._write("driver", version)

    def count_calls(self) -> None:
        """Begin to note calls, and forget those that were noted."""
        (self.folder / "calls").write_bytes(b"")

    def calls(self, function: str = "", uuid: str = "") -> list[str]:
        """Give the functions that were called since `count_calls`, in order; only those of a name, or for a device."""
        lines = [line.split() for line in (self.folder / "calls").read_text(encoding="utf-8").splitlines()]
        return [name for name, whose in lines if function in ("", name) and uuid in ("", whose)]

    def _write(self, name: str, text: str) -> None:
        # In one step: the library may be reading.
        fresh = self.folder / f"fresh.{name.replace('/', '.')}"
        fresh.write_text(text, encoding="utf-8")
        fresh.rename(self.folder / name)


class RealMachine(Machine):
    """The GPUs that are really here."""

    def __init__(self, state_dir: Path) -> None:
        """Look which there are."""
        super().__init__(Path(), state_dir)
        self._nvml = Nvml()
        self._found = [(device.uuid, device.name, device.total_bytes // _MIB) for device in self._nvml.devices()]

    def _devices(self) -> list[tuple[str, str, int]]:
        return self._found

    def used_mib(self, uuid: str) -> int:
        """Give what is in use on a device now."""
        reading = self._nvml.read(uuid)
        assert isinstance(reading, Reading)
        return reading.used_bytes // _MIB


def result(name: str, value: object) -> None:
    """Print a figure of a run on real devices, which is kept with it."""
    print(json.dumps({name: value}))  # noqa: T201 - it is what the run is for
