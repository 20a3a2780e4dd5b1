"""Every mistake gets one line and an exit code, no traceback, and costs nothing.

`python tests/test_bad_input.py` prints the table of mistakes and lines as Markdown.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command import invoke
from mistakes import CASES, RUN, Case, Desk

COMMAND = Path(sys.executable).with_name("dscompress")
MOUNTS = sys.platform == "linux" and os.geteuid() == 0
QUICK = [*RUN, "--set", "stages.0.format=gptq"]  # verified in this process, not by a stock loader in another
ROOM = "a file system of one's own needs root on Linux"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield Desk(tmp_path, stack)


def contents(folder: Path) -> dict[str, bytes]:
    """Files and what is in them; folders too."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def pattern(line: str, folder: Path) -> str:
    return re.escape(line.replace("FOLDER", str(folder))).replace("…", ".+")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_and_nothing_lost(case: Case, desk: Desk) -> None:
    if case.mounts and not MOUNTS:
        pytest.skip(ROOM)
    arguments = case.arrange(desk)
    before = contents(desk.folder)
    result = invoke(*arguments)
    assert result.exit_code == case.code
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.endswith("\n".join(lines) + "\n")
    assert re.fullmatch(pattern(case.line, desk.folder), "\n".join(line.removeprefix("error: ") for line in lines))
    after = contents(desk.folder)
    work = (str(desk.file(".dscompress")), str(desk.file("little/work")))
    assert {path: data for path, data in after.items() if not (case.started and path.startswith(work))} == before


def test_names_of_mistakes_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("debug", "first"), [([], "error: "), (["--debug"], "Traceback (most recent call last):")])
def test_exit_code_of_the_process(desk: Desk, debug: list[str], first: str) -> None:
    desk.stage("bits: 5")
    done = subprocess.run([COMMAND, *RUN, *debug], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(first)
    assert done.stderr.endswith("error: recipe.yaml:9: stages.0.bits: 5 is not allowed; use 2, 3, 4 or 8\n")


def test_links_of_a_hub_cache_are_followed(desk: Desk) -> None:
    blobs = desk.file("blobs")
    blobs.mkdir()
    index = desk.shards()
    for number, file in enumerate(sorted(index.parent.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    result = invoke("validate", "recipe.yaml")
    assert (result.exit_code, result.stdout) == (0, "recipe.yaml: valid\n")


def test_an_output_behind_a_link_is_written_there(desk: Desk) -> None:
    desk.file("disk").mkdir()
    desk.file("out").symlink_to("disk/result")
    assert invoke(*QUICK).exit_code == 0
    assert desk.file("out").is_symlink()
    assert desk.file("disk/result/model.safetensors").is_file()


def test_other_folders_beside_the_output_are_left_alone(desk: Desk) -> None:
    for name in ("out.old", "out.part", "out.tmp"):
        desk.file(name).mkdir()
        desk.write(f"{name}/keep.txt", "mine")
    for _ in range(2):
        assert invoke(*QUICK).exit_code == 0
    assert [desk.file(f"{name}/keep.txt").read_text() for name in ("out.old", "out.part", "out.tmp")] == ["mine"] * 3


def test_a_model_with_code_of_its_own_runs_where_that_is_allowed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(desk.file("modules")))
    desk.write(
        "model/own.py",
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'mine'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n",
    )
    desk.config(model_type="mine", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    allowed = ["--set", "trust_remote_code=true"]
    assert invoke("validate", "recipe.yaml", *allowed).exit_code == 0
    result = invoke(*QUICK, *allowed)
    assert result.exit_code == 0, result.stderr
    assert desk.file("out/own.py").is_file()
    verified = invoke("verify", "out", "--device", "cpu", "--trust-remote-code")
    assert verified.exit_code == 0 and verified.stdout.endswith("PASS\n")


def test_default_keys_of_experts_make_no_mixture(desk: Desk) -> None:
    """Configs of dense models keep them where a family has mixtures too; the weights say what a model is."""
    desk.config(is_moe=False, num_local_experts=8, num_experts=128, n_routed_experts=64, moe_intermediate_size=96)
    result = invoke(*QUICK)
    assert result.exit_code == 0, result.stderr
    assert desk.file("out/model.safetensors").is_file()


def test_a_config_may_say_that_outputs_are_tuples(desk: Desk) -> None:
    desk.config(return_dict=False)
    result = invoke(*RUN)
    assert result.exit_code == 0, result.stderr
    assert json.loads(desk.file("out/report.json").read_text())["verified"]["max_logit_difference"] == 0


@pytest.mark.skipif(not MOUNTS, reason=ROOM)
def test_a_run_continues_when_the_full_disk_has_room_again(desk: Desk) -> None:
    disk = desk.mount("little", "size=400k")
    command = [*QUICK, "--work-dir", "little/work"]
    stopped = invoke(*command)
    assert (stopped.exit_code, "no space left on the disk" in stopped.stderr) == (2, True)
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    continued = invoke(*command)
    assert continued.exit_code == 0, continued.stderr
    (stage,) = json.loads(desk.file("out/report.json").read_text())["stages"]
    assert stage["resumed_layers"] == 2
    assert invoke(*QUICK, "--output", "whole", "--work-dir", "work").exit_code == 0
    one, other = (desk.file(f"{name}/model.safetensors").read_bytes() for name in ("out", "whole"))
    assert one == other


@pytest.mark.skipif(not MOUNTS, reason=ROOM)
def test_a_full_disk_at_the_end_leaves_the_earlier_output(desk: Desk) -> None:
    disk = desk.mount("little", "size=1300k")
    command = [*QUICK, "--output", "little/out", "--work-dir", "work"]
    assert invoke(*command).exit_code == 0
    before = contents(disk)
    result = invoke(*command, "--set", "stages.0.bits=8")
    assert result.exit_code == 2
    assert re.search(r"^error: \S+: no space left on the disk; free some and run the same", result.stderr, re.MULTILINE)
    assert contents(disk) == before


def markdown() -> str:
    """The table of mistakes and lines."""
    rows = [f"| {case.name} | {case.code} | `{case.line.replace(chr(10), '`<br>`')}` |" for case in CASES]
    return "\n".join(["| what is wrong | exit code | what it says |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(markdown())
