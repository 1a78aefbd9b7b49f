"""`alf-moe doctor`: each line says what is missing and how to get it; only what a run needs makes it fail."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from launch import cli, doctor
from launch.doctor import Finding
from tests.corpus import make_token_folder


def test_a_machine_that_can_train_is_0(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", refuse_wandb(socket.create_connection))
    data = make_token_folder(tmp_path / "data")
    assert cli.main(["doctor", "--data", str(data), "--runs", str(tmp_path / "runs" / "deep")]) == 0
    lines = {
        line.split()[1] if line.split()[1] != "our" else "our files": line
        for line in capsys.readouterr().out.splitlines()
    }
    assert list(lines) == [*doctor.checks(data, tmp_path, offline=False)]
    assert lines["gloo"].startswith("ok") and "added 1 and 1" in lines["gloo"]
    assert lines["wandb"].startswith("note") and "log offline" in lines["wandb"]  # never fatal
    assert "4,000 training tokens" in lines["data"] and not (tmp_path / "runs").exists()


def refuse_wandb(connect):
    def refuse(address, *args, **kwargs):
        if address == doctor.WANDB_SERVER:
            assert kwargs["timeout"] <= 5
            raise OSError("unreachable")
        return connect(address, *args, **kwargs)

    return refuse


def test_what_a_run_needs_makes_it_1_and_the_rest_does_not(capsys):
    good, note, bad = Finding(True, "a"), Finding(None, "b", "c"), Finding(False, "d", "e")
    assert doctor.report({"x": lambda: good, "y": lambda: note}) == 0
    assert doctor.report({"x": lambda: bad, "y": lambda: good}) == 1
    assert doctor.report({"z": lambda: 1 // 0}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[0] for line in lines] == ["ok", "note", "missing", "ok", "missing"]
    assert lines[2].endswith("d: e") and "ZeroDivisionError" in lines[4]


def test_another_package_of_our_name_is_seen(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from launch import doctor; print(doctor.shadowed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ok=False" in done.stdout and "import kernels finds" in done.stdout
    assert doctor.shadowed().ok


def test_absent_packages_and_processes_that_cannot_meet(monkeypatch):
    def version(name):
        if name in ("xxhash", "triton"):
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    assert doctor.packages() == (False, "not installed: xxhash", f"{sys.executable} -m pip install xxhash")
    assert doctor.triton().ok is False
    monkeypatch.setattr(doctor, "GLOO", "raise OSError('no loopback')")
    found = doctor.gloo()
    assert found.ok is False and "OSError" in found.what and found.remedy


def test_disk_and_data(tmp_path, monkeypatch):
    assert doctor.disk(tmp_path / "none" / "yet").ok
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**29))
    assert doctor.disk(tmp_path) == (
        False,
        f"0.50 GiB free under {tmp_path}",
        "free some, or choose another --run.folder",
    )
    assert doctor.prepared(tmp_path / "none").ok is None
    data = make_token_folder(tmp_path / "data")
    (data / "text-train.bin").write_bytes(b"")
    assert doctor.prepared(data).ok is False and "text-train.bin" in doctor.prepared(data).what


@pytest.mark.parametrize(
    ("words", "says"), [(["--fast"], "--fast is not an option"), (["--data"], "--data has no value")]
)
def test_wrong_words_are_one_sentence(words, says, capsys):
    assert doctor.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {says}") and len(err.splitlines()) == 1
