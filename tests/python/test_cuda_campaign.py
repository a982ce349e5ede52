"""benchmarks/cuda: the order of a campaign's passes, and kernels compiled ahead, on a CPU."""

import io
import sys
import tarfile
from pathlib import Path

import mlx.core as mx
import pytest
from moefuse.lab import variants

CUDA = Path(__file__).parents[2] / "benchmarks" / "cuda"


@pytest.fixture
def cuda_script(monkeypatch):
    monkeypatch.syspath_prepend(str(CUDA))
    for name in ("campaign", "compile_ahead"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name):
        return __import__(name)

    return load


class Clock:
    """Passes whose benches take what they are told to, the control 60 s and a variant 20 s."""

    def __init__(self, seconds):
        self.left, self.done, self.log = seconds, {}, []

    def bench(self, name, extras, seconds):
        start, count = self.left, self.done.get(name)
        if count is None:
            self.left, count = self.left - 60, 0
        while count < len(extras) and start - self.left <= seconds:
            self.left, count = self.left - 20, count + 1
        self.done[name] = count
        self.log.append((name, count))

    def cells(self, name, contexts, batches, seconds):
        self.left -= seconds
        self.log.append((name, contexts, batches))


def test_isolated_kernels_share_the_time_and_the_first_model_goes_on_behind(cuda_script):
    campaign = cuda_script("campaign")
    plenty = Clock(600.0)
    campaign.isolated(plenty, ["a", "b"])
    assert plenty.done == {"a": len(campaign.ISOLATED), "b": len(campaign.ISOLATED)}
    assert [name for name, _ in plenty.log] == ["a", "b"]  # nothing is measured twice
    scarce = Clock(340.0)
    campaign.isolated(scarce, ["a", "b"])
    assert [name for name, _ in scarce.log][:2] == ["a", "b"]
    assert scarce.left >= 0 and min(scarce.done.values()) >= 4
    late = Clock(460.0)  # the second needs less than its share: the first goes on behind it
    late.done["b"] = len(campaign.ISOLATED)
    campaign.isolated(late, ["a", "b"])
    assert [name for name, _ in late.log] == ["a", "b", "a"]
    assert late.done["a"] == len(campaign.ISOLATED)


def test_every_isolated_variant_is_one_and_says_its_arithmetic(cuda_script):
    campaign = cuda_script("campaign")
    for spec in campaign.ISOLATED + campaign.EXTRAS + (campaign.STEP,):
        assert variants.parse(spec).name == spec
    alone = {spec.partition(":")[0] for spec in campaign.ISOLATED if "+" not in spec}
    assert alone | {"step"} == set(variants.PARTS)


def test_cells_ask_for_a_long_context_and_every_batch(cuda_script):
    passes = Clock(200.0)
    cuda_script("campaign").cells(passes, ["a", "b"])
    assert passes.left >= 0
    assert [name for name, *_ in passes.log] == ["a", "b"]
    for _, contexts, batches in passes.log:
        assert {"128", "1024", "8192", "32768"} <= set(contexts.split(","))
        assert sorted(batches.split(",")) == ["1", "2", "4"]


def test_every_job_is_a_product(cuda_script):
    ahead = cuda_script("compile_ahead")
    for job, (dtype, _, rows) in ahead.JOBS.items():
        y = ahead.product(job)
        mx.eval(y)
        assert y.dtype == getattr(mx, dtype) and y.shape[0] == rows, job


def test_kernels_travel_and_nothing_leaves_their_folder(cuda_script, tmp_path, monkeypatch):
    ahead = cuda_script("compile_ahead")
    monkeypatch.setenv(ahead.FOLDER, str(tmp_path / "one"))
    deep = tmp_path / "one" / ("n" * 60)
    deep.mkdir(parents=True)
    for name in ("a.ptx", "a.txt", "a.cu"):
        (deep / name).write_bytes(name.encode())
    file = tmp_path / "kernels.tar.gz"
    ahead.save(file)
    with tarfile.open(file, "r:gz") as packed:
        names = packed.getnames()
    assert names == [f"{'n' * 60}/a.ptx", f"{'n' * 60}/a.txt"]
    with tarfile.open(file, "w:gz") as packed:
        for name in ("in/a.ptx", "../out.ptx", str(tmp_path / "out.ptx")):
            info = tarfile.TarInfo(name)
            info.size = 1
            packed.addfile(info, io.BytesIO(b"x"))
    monkeypatch.setenv(ahead.FOLDER, str(tmp_path / "two"))
    ahead.load(file)
    assert [p.name for p in tmp_path.rglob("*.ptx") if "one" not in p.parts] == ["a.ptx"]
    assert (tmp_path / "two" / "in" / "a.ptx").read_bytes() == b"x"


def test_without_a_gpu_nothing_is_compiled(cuda_script, capsys, monkeypatch):
    if mx.cuda.is_available():
        pytest.skip("a CUDA device is here")
    cuda_script("compile_ahead").main([])
    assert "no CUDA device" in capsys.readouterr().out
