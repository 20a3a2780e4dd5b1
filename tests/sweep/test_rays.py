"""Points made on a real Ray cluster of two nodes on this machine: what they write, what they say, which are lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stock_here
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_model import write_model

import compress
from compress.errors import DscompressError
from compress.recipe.schema import bundled_dir
from compress.sweeps import rays
from compress.sweeps.rays import RayWorkers, shares
from compress.sweeps.work import Event, Task, make

ray = pytest.importorskip("ray")

# Ray leaves sockets and log files of its own to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning:ray"), pytest.mark.timeout(120)]

# What Python runs first on the odd node: when it is looked at, a file says what is odd about it.
ODD = """
import pathlib

def read_bytes(self, usual=pathlib.Path.read_bytes):
    exec(pathlib.Path({mood!r}).read_text())
    return usual(self)

pathlib.Path.read_bytes = read_bytes
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        sizes = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}
        running = Cluster(initialize_head=True, head_node_args=sizes | {"include_dashboard": False})
        running.add_node(**sizes)
        yield running
        running.shutdown()


@pytest.fixture
def begin(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., RayWorkers]]:
    begun: list[RayWorkers] = []

    def begin(jobs: int | None = None) -> RayWorkers:
        begun.append(RayWorkers(cluster.address, tmp_path / "sweep", jobs, tmp_path / "work"))
        return begun[-1]

    yield begin
    for workers in begun:
        workers.close()
    assert not ray.is_initialized()


def task(name: str = "point") -> Task:
    return Task(name, {}, "cpu", "work")


def wait(workers: RayWorkers, until: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + 60
    while not until(events):
        assert time.monotonic() < deadline, events
        events += workers.events(1.0)
    return events


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def speaking() -> Callable[..., Event]:
    """Local, so that Ray sends it as code: workers can't import tests."""

    def make(task: Task, say: Callable[[str], None]) -> Event:
        import os
        import threading

        say(f"{os.getpid()}\nsecond line, ünd more")
        say("more")
        if "sleep" in task.name:
            threading.Event().wait()
        if "raise" in task.name:
            raise OSError("no such disk\nand more")
        return Event(task.name, "done", "made", 1.5)

    return make


def test_what_points_say_comes_before_their_end_and_counts_against_the_room(
    begin: Callable[..., RayWorkers], tmp_path: Path
) -> None:
    usual = signal.getsignal(signal.SIGTERM)
    workers = begin()
    assert signal.getsignal(signal.SIGTERM) is usual
    assert [node["version"] for node in workers.nodes] == [compress.__version__] * 2
    assert workers.nodes[0]["torch"] == torch.__version__
    workers._make = speaking()
    assert workers.free == 2 and workers.events(5.0) == []
    workers.start(task("a"))
    assert workers.free == 1
    workers.start(task("b, raise"))
    assert workers.free == 0
    events = wait(workers, lambda events: sum(event.kind != "said" for event in events) == 2)
    of_a = [event for event in events if event.name == "a"]
    assert [event.kind for event in of_a] == ["said", "said", "done"]
    assert of_a[0].text.endswith("\nsecond line, ünd more") and of_a[2] == Event("a", "done", "made", 1.5)
    of_b = [event for event in events if event.name == "b, raise"]
    assert [event.kind for event in of_b] == ["said", "said", "lost"]
    assert of_b[2].text == "OSError: no such disk" and of_b[2].seconds > 0
    assert int(of_a[0].text.split()[0]) != int(of_b[0].text.split()[0])
    assert workers.free == 2
    workers.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_worker_loses_its_point_and_close_ends_the_others(begin: Callable[..., RayWorkers]) -> None:
    workers = begin(jobs=2)
    workers._make = speaking()
    workers.start(task("sleep 1"))
    workers.start(task("sleep 2"))
    said = wait(workers, lambda events: len(events) == 4)
    pids = {event.name: int(event.text.split()[0]) for event in said if "second" in event.text}
    os.kill(pids["sleep 1"], signal.SIGKILL)
    (lost,) = wait(workers, bool)
    assert (lost.name, lost.kind) == ("sleep 1", "lost") and "died" in lost.text and "\n" not in lost.text
    assert workers.free == 1 and alive(pids["sleep 2"])
    workers.close()
    assert gone(pids["sleep 2"])


def test_a_killed_sweep_takes_its_points_with_it(cluster: Any, tmp_path: Path) -> None:
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(stock_here.__file__).parent)!r}]
from pathlib import Path
from compress.sweeps.rays import RayWorkers
from test_rays import speaking, task
workers = RayWorkers({cluster.address!r}, Path({str(tmp_path)!r}), None)
workers._make = speaking()
workers.start(task("sleep"))
while not (events := workers.events(1.0)):
    pass
print(events[0].text.split()[0], flush=True)
workers.events(600.0)
"""
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pid = int(driver.stdout.readline())
    assert alive(pid)
    driver.kill()
    driver.communicate()
    assert gone(pid)


@pytest.fixture(scope="module")
def mood(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "sitecustomize.py").write_text(ODD.format(mood=str(folder / "mood")))
    node = cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 << 20, env_vars={"PYTHONPATH": str(folder)})
    yield folder / "mood"
    cluster.remove_node(node)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("raise FileNotFoundError(self)", "does not see {folder}/work; put --output on a disk that all nodes share"),
        (
            "import sys; sys.modules['compress'] = None",
            "has no dscompress, this machine {ours}; install the same on both",
        ),
        (
            "import compress; compress.__version__ = '0.0.9'",
            "has dscompress 0.0.9, this machine {ours}; install the same on both",
        ),
    ],
)
def test_a_node_that_cannot_make_points_is_named(
    begin: Callable[..., RayWorkers], cluster: Any, mood: Path, tmp_path: Path, odd: str, said: str
) -> None:
    mood.write_text(odd)
    with pytest.raises(DscompressError) as caught:
        begin()
    mood.write_text("")
    ip = cluster.head_node.node_ip_address
    assert str(caught.value) == f"Ray node {ip} " + said.format(folder=tmp_path, ours=compress.__version__)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("auto", "on this machine"),
        ("127.0.0.1:1", "at 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "at ray://127.0.0.1:1"),
        ("nonsense", "at nonsense"),
    ],
)
def test_where_no_cluster_answers_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path, address: str, where: str
) -> None:
    monkeypatch.setattr(rays, "_ANSWER", 2.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of "auto"
    with pytest.raises(DscompressError) as caught:
        RayWorkers(address, tmp_path, None)
    said = str(caught.value)
    assert said.startswith(f"no Ray cluster answers {where}") and "or use --jobs" in said and "\n" not in said
    assert capfd.readouterr() == ("", "") and not ray.is_initialized() and not list(tmp_path.iterdir())


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    with pytest.raises(DscompressError, match=r"^ray is not installed; pip install 'dscompress\[ray\]'$"):
        RayWorkers("auto", tmp_path, None)


def test_a_connection_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(DscompressError, match="^this process uses Ray already; call"):
        RayWorkers("auto", tmp_path, None)


sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


@given(sizes, st.none() | st.integers(1, 20))
def test_shares_fit_the_nodes(sizes: list[tuple[int, int, bool]], jobs: int | None) -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": float(cpu), "GPU": float(gpu)}} for cpu, gpu, alive in sizes]
    there = [(cpu, gpu) for cpu, gpu, alive in sizes if alive]
    if not any(cpu or gpu for cpu, gpu in there):
        with pytest.raises(DscompressError, match="neither GPUs nor CPUs"):
            shares(nodes, jobs)
        return
    able, gpus, cpus, room = shares(nodes, jobs)
    # Points are put on nodes one at a time, as Ray would, until none has room or all jobs are there.
    left, placed = [list(node) for node in there], 0
    while placed < (jobs or 100):
        fits = [node for node in left if node[0] >= cpus and node[1] >= gpus]
        if not fits:
            break
        fits[0][0] -= cpus
        fits[0][1] -= gpus
        placed += 1
    assert placed == room >= 1
    assert gpus == any(gpu for _, gpu in there)
    assert all(node["Alive"] and node["Resources"]["GPU" if gpus else "CPU"] for node in able)
    if not gpus:
        total, biggest = sum(cpu for cpu, _ in there), max(cpu for cpu, _ in there)
        assert cpus == (1 if jobs is None else max(1, min(total // jobs, biggest)))


def asking_here(support: Path) -> Callable[..., Event]:
    """`make`, with what conftest.py does here for the time that stock transformers takes to start."""

    def make(task: Task, say: Callable[[str], None]) -> Event:
        import sys

        sys.path.insert(0, str(support))
        from stock_here import asked_here

        import compress.evaluation.base
        from compress.sweeps import work

        compress.evaluation.base.asked = asked_here  # type: ignore[assignment]
        return work.make(task, say)

    return make


def test_real_points_at_the_same_time_are_those_of_this_process(
    begin: Callable[..., RayWorkers], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The library stood at the corner of two quiet streets, and nobody knew who had built it.\n" * 60)
    source = str(bundled_dir("calibration") / "text" / "general_en.jsonl.gz")

    def recipe(bits: int, output: Path) -> dict[str, Any]:
        return {
            "name": f"bits-{bits}", "model": str(model), "output": str(output),
            "calibration": {"source": source, "samples": 4, "sequence_length": 64},
            "stages": [{"kind": "quantize", "method": "gptq", "bits": bits, "group_size": 32, "format": "gptq"}],
            "evaluate": {"text": str(text), "sequence_length": 64, "windows": 2, "prompts": []},
        }  # fmt: skip

    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())  # the nodes' too
    workers = begin()
    assert workers._make is make
    workers._make = asking_here(Path(stock_here.__file__).parent)
    for bits in (4, 3):
        workers.start(Task(f"{bits}", recipe(bits, tmp_path / f"ray-{bits}"), "cpu", str(tmp_path / "work")))
    events = wait(workers, lambda events: sum(event.kind != "said" for event in events) == 2)
    assert {(event.name, event.kind) for event in events if event.kind != "said"} == {("4", "done"), ("3", "done")}
    assert any(event.kind == "said" and "gptq 4-bit: 2/2 layers" in event.text for event in events)
    for bits in (4, 3):
        compress.run(recipe(bits, tmp_path / f"here-{bits}"), device="cpu", work_dir=tmp_path / "work-here")
        made, ours = tmp_path / f"ray-{bits}", tmp_path / f"here-{bits}"
        files = sorted(path.name for path in ours.glob("*.safetensors"))
        assert files and files == sorted(path.name for path in made.glob("*.safetensors"))
        assert all((made / file).read_bytes() == (ours / file).read_bytes() for file in files)
