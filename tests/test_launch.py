"""What the launch scripts would do, from their dry runs; nothing here reaches a cloud."""

import gzip
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import default
from ssp_jax import main
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.config.files import load_config
from ssp_jax.evaluation import paper_table
from ssp_jax.model import hf_files
from ssp_jax.plan import hardware
from ssp_jax.retriever import search
from ssp_jax.runtime import platform
from tests.conftest import ROOT

SCRIPTS = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch" / "docker").glob("*.sh")]
CONFIG = "--config=configs/tiny.py"
TPU = ("tpu_pod.sh", "run", "ssp", "us-east5-a")


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / arguments[0]), *arguments[1:]]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


# Splits each line as bash does, which has printed it with %q.
SPLIT = r"""while IFS= read -r line; do
  eval "words=($line)"; printf '%s\0' "${words[@]}"; printf '\0'
done"""


def commands(*arguments: str) -> list[list[str]]:
    """The printed commands, word by word."""
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    split = subprocess.run(
        ["bash", "-c", SPLIT], input=done.stdout, capture_output=True, text=True, timeout=60
    )
    return [words.split("\0") for words in split.stdout.split("\0\0") if words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shellcheck_clean(script: Path) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_a_tpu_run_creates_installs_starts_and_shows_the_log() -> None:
    printed = commands(
        *TPU,
        "v5p-16",
        "--spot",
        "--bucket=a-bucket",
        "--data=gs://ours/files",
        "--dry-run",
        "--",
        CONFIG,
        "--workdir=../bucket/a run",
    )
    known = ("buckets", "ls", "queued-resources", "archive", "scp", "ssh")
    verbs = [next(w for w in words if w in known) for words in printed]
    looked = ["buckets", "ls", "queued-resources"]
    assert verbs == [*looked, "queued-resources", "archive", "scp", *["ssh"] * 6]
    create, send, install, mount, copy, start, logs = printed[3], *printed[5:11]
    assert {
        "ssp",
        "--node-id=ssp",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
    } <= set(create)
    assert all("--zone=us-east5-a" in words for words in printed[2:] if words[0] == "gcloud")
    assert "--worker=all" in send and "--worker=all" in install and "jax[tpu]" in install[-1]
    assert "--worker=all" in mount and " a-bucket bucket" in mount[-1]
    assert "--worker=all" in copy and "rsync --recursive --quiet gs://ours/files data" in copy[-1]
    assert "--worker=all" in start and CONFIG in start[-1] and "ssp_jax.main" in start[-1]
    assert "--worker=0" in logs and "run.log" in logs[-1]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_has_its_runtime(kind: str, runtime: str) -> None:
    create = commands(*TPU, kind, "--dry-run", "--", CONFIG)[1]
    assert f"--runtime-version={runtime}" in create and "--spot" not in create


def test_a_slice_is_deleted_whole() -> None:
    assert commands("tpu_pod.sh", "delete", "ssp", "us-east5-a", "--dry-run") == [
        [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            "ssp",
            "--force",
            "--quiet",
            "--zone=us-east5-a",
        ]
    ]


def fake_gcloud(folder: Path, *states: str, failing: tuple[str, ...] = ()) -> dict[str, str]:
    """A gcloud on PATH that reports these states one after the other and then ACTIVE, and logs what
    it was asked.

    failing: the steps that fail, one after the other, and their exit codes.
    """
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    (folder / "failing").write_text("".join(f"{step}\n" for step in failing))
    script = folder / "gcloud"
    script.write_text(
        f"""#!/bin/bash
cd {shlex.quote(str(folder))}
case "$*" in
  storage*) grep -q missing <<< "$*" && exit 1 ;;
  *describe*) if [ -s states ]; then head -n 1 states; sed -i 1d states; else echo ACTIVE; fi ;;
  *--command=cat*) echo 3 ;;
  *)
    printf '%s\\n' "$4 $5 $6" >> asked
    read -r step code < failing && [ "$4" = "$step" ] && sed -i 1d failing && exit "$code" ;;
esac
exit 0
"""
    )
    script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "POLL": "0", "TMPDIR": str(folder)}


def test_a_preempted_slice_is_made_anew_and_the_exit_code_is_the_runs(tmp_path: Path) -> None:
    states = (
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
        "SUSPENDING",
        "SUSPENDING",
        "SUSPENDED",
        "",
        "PROVISIONING",
    )
    done = launch(*TPU, "v6e-16", "--", CONFIG, **fake_gcloud(tmp_path, *states))
    assert done.returncode == 3, done.stdout + done.stderr
    asked = [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]
    once = ["scp", "ssh", "ssh", "ssh"]
    assert asked == [*once, "delete", "create", *once], done.stdout


@pytest.mark.parametrize(
    ("failing", "again"),
    [
        (("scp 255",), ["scp"]),
        (("ssh 255",), ["scp", "ssh"]),  # install
        (("scp 1", "scp 1", "ssh 2"), ["scp", "scp", "scp", "ssh"]),
    ],
)
def test_a_step_that_fails_is_tried_again(
    tmp_path: Path, failing: tuple[str, ...], again: list[str]
) -> None:
    done = launch(
        *TPU, "v6e-16", "--bucket=b", "--", CONFIG, **fake_gcloud(tmp_path, failing=failing)
    )
    assert done.returncode == 3, done.stdout + done.stderr
    asked = [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]
    assert (
        asked == [*again, "scp", "ssh", "ssh", "ssh", "ssh"] and "failed; again in" in done.stderr
    )


def test_a_lost_network_does_not_end_what_has_a_slice(tmp_path: Path) -> None:
    """Nobody answers: neither is the slice seen nor can one be created. Without any slice before
    that is the end.
    """
    states, failing = ("ACTIVE", "SUSPENDED", "SUSPENDED", ""), ("delete 1", "create 1")
    done = launch(*TPU, "v6e-16", "--", CONFIG, **fake_gcloud(tmp_path, *states, failing=failing))
    assert done.returncode == 3, done.stdout + done.stderr
    assert [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()].count(
        "create"
    ) == 1
    (tmp_path / "asked").unlink()
    done = launch(*TPU, "v6e-16", "--", CONFIG, **fake_gcloud(tmp_path, "", failing=("create 1",)))
    assert done.returncode == 1 and (tmp_path / "asked").read_text().startswith("create")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (("--bucket=missing", "--", CONFIG), "--bucket=missing cannot be read"),
        (("--data=gs://missing/files", "--", CONFIG), "--data=gs://missing/files cannot be read"),
        (("--", "--config=configs/none.py"), "configs/none.py is not in commit"),
    ],
)
def test_a_path_that_is_not_there_is_told_before_anything_is_created(
    tmp_path: Path, wrong: tuple[str, ...], named: str
) -> None:
    done = launch(*TPU, "v6e-16", *wrong, **fake_gcloud(tmp_path, ""))
    assert done.returncode == 2 and named in done.stderr, done.stdout + done.stderr
    assert not (tmp_path / "asked").exists()


def test_data_lies_on_the_disk_of_each_worker_where_configs_name_it(tmp_path: Path) -> None:
    environment = fake_worker(tmp_path)
    program = tmp_path / "gcloud"
    copies = """[[ $2 != rsync ]] || { echo "$5" > "$6/from"; exit; }
[[ $1 != storage ]] || exit 0
"""
    program.write_text(program.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{copies}", 1))
    done = launch(*TPU, "v6e-16", "--data=gs://ours/files", "--", CONFIG, **environment)
    assert done.returncode == 5, done.stdout + done.stderr
    found = tmp_path / "worker" / "ssp_jax" / "data" / "from"
    assert found.read_text() == "gs://ours/files\n"


def test_a_bucket_that_cannot_be_mounted_ends_it(tmp_path: Path) -> None:
    environment = fake_worker(tmp_path)
    (tmp_path / "gcsfuse").write_text("#!/bin/bash\necho no such bucket >&2\nexit 1\n")
    done = launch(*TPU, "v6e-16", "--bucket=b", "--", CONFIG, **environment)
    assert done.returncode == 2 and "no such bucket" in done.stderr, done.stdout + done.stderr


def test_a_worker_without_gcsfuse_gets_it(tmp_path: Path) -> None:
    environment = fake_worker(tmp_path)
    for name, body in {
        "curl": "echo a key",
        "lsb_release": "echo jammy",
        "sudo": """[[ $1 != tee ]] || echo "$2 $(cat)" >> ~/told
[[ "$*" != *"install gcsfuse"* ]] || mv ~/../packed ~/../gcsfuse""",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "gcsfuse").rename(tmp_path / "packed")
    done = launch(*TPU, "v6e-16", "--bucket=b", "--", CONFIG, **environment)
    assert done.returncode == 5, done.stdout + done.stderr
    key, source = (tmp_path / "worker" / "told").read_text().splitlines()
    assert key.endswith(" a key")
    assert f"[signed-by={key.split()[0]}]" in source and source.endswith(" gcsfuse-jammy main")
    assert (tmp_path / "worker" / "mounted").read_text().endswith(" b bucket\n")


def fake_worker(folder: Path) -> dict[str, str]:
    """A gcloud whose worker is a folder here: what is sent there runs there; uv makes a Python that
    notes its call.
    """
    home = folder / "worker"
    programs = {
        "gcloud": f"""cd {shlex.quote(str(home))}
echo "$*" >> ../sent
case "$*" in
  *describe*) echo ACTIVE ;;
  *scp*) cp "$5" ssp_jax.tar.gz && echo copied >> ../asked ;;
  *) for argument in "$@"; do
       [[ $argument != --command=* ]] || HOME=$PWD bash -c "${{argument#*=}}"
     done ;;
esac""",
        "python3": "",  # pip install uv
        "gcsfuse": 'echo "$*" >> ~/mounted',
        "worker/.local/bin/uv": """if [[ $1 == pip ]]; then echo "$*" >> ~/../asked && exit 0; fi
mkdir -p .venv/bin
printf '%s\n' '#!/bin/bash' 'printf "%s|" "$@" >> ~/calls; sleep 0.2; echo played; exit 5' \\
  > .venv/bin/python
chmod +x .venv/bin/python""",
    }
    (home / ".local/bin").mkdir(parents=True)
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "POLL": "0", "TMPDIR": str(folder)}


def test_a_tpu_worker_runs_the_command_as_given_and_installs_a_commit_once(tmp_path: Path) -> None:
    environment, worker = fake_worker(tmp_path), tmp_path / "worker"
    for _ in range(2):
        done = launch(*TPU, "v6e-16", "--bucket=b", "--", CONFIG, "--workdir=a run", **environment)
        assert done.returncode == 5 and "played" in done.stdout, done.stdout + done.stderr
    assert (worker / "mounted").read_text().splitlines()[0].endswith(" b bucket") and (
        worker / "bucket"
    ).is_dir()
    assert (worker / "calls").read_text() == f"-m|ssp_jax.main|{CONFIG}|--workdir=a run|" * 2
    (installed,) = (
        line for line in (tmp_path / "asked").read_text().splitlines() if line != "copied"
    )
    assert "requirements.txt" in installed and "jax[tpu]" in installed
    assert (worker / "ssp_jax" / "launch" / "tpu_pod.sh").is_file()


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    """The connection was lost and another commit is here: neither is the run started twice nor its
    code replaced.
    """
    environment, run = fake_worker(tmp_path), tmp_path / "worker" / "ssp_jax"
    run.mkdir()
    (run / "COMMIT").write_text("another")
    until_shown = (
        f"until grep -q tail {shlex.quote(str(tmp_path / 'sent'))}; do sleep 0.05; done 2>/dev/null"
    )
    append = ["bash", "-c", f"({until_shown}) & echo $!; wait"]
    with subprocess.Popen(append, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (run / "run.pid").write_text(process.stdout.readline())
        (run / "run.log").write_text("step 3\n")
        (run / "run.exit").write_text("7")
        done = launch(*TPU, "v6e-16", "--", CONFIG, **environment)
    assert done.returncode == 7 and "step 3" in done.stdout, done.stdout + done.stderr
    assert (run / "COMMIT").read_text() == "another" and not (
        tmp_path / "worker" / "calls"
    ).exists()


def test_a_slurm_job_has_one_process_per_node_with_all_gpus() -> None:
    printed = commands("slurm_gpu.sh", "--dry-run", "2", "8", "--time=24:00:00", "--", CONFIG)
    submit, set_, run, signal, requeue = printed
    assert submit[0] == "sbatch" and {"--nodes=2", "--gpus-per-node=8", "--time=24:00:00"} <= set(
        submit
    )
    assert "--export=ALL,SSP_JAX_SUBMITTED=yes,VENV=.venv" in submit
    assert set_ == ["export", "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7"] and run[0] == "srun"
    assert run[-3:] == ["-m", "ssp_jax.main", CONFIG] and signal[-3:] == [
        "scancel",
        "--signal=TERM",
        "JOB",
    ]
    assert requeue[-3:] == ["scontrol", "requeue", "JOB"]
    assert "--ntasks-per-node=1" in (ROOT / "launch" / "slurm_gpu.sh").read_text()


EXPORT = """for argument in "$@"; do
  if [[ $argument == --export=* ]]; then
    IFS=, read -ra parts <<< "${argument#*=}"
    for part in "${parts[@]}"; do [[ $part != *=* ]] || export "$part"; done
  fi
done
"""  # what srun makes of --export: parts between commas


def fake_slurm(folder: Path, srun: str) -> dict[str, str]:
    """srun runs the task beside itself, and at SIGTERM kills it as Slurm's does; scancel signals
    the task.
    """
    task = shlex.quote(str(folder / "task"))
    programs = {
        "srun": f"""{EXPORT}( echo $BASHPID > {task}; {srun} ) & child=$!
trap 'echo killed; kill -9 $child; exit 143' TERM
wait $child""",
        "scancel": f'[[ "$*" == "--signal=TERM 77" ]] && kill -TERM "$(cat {task})"',
        "scontrol": 'echo "scontrol $*"',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_GPUS_ON_NODE": "2",
        "SSP_JAX_SUBMITTED": "yes",
        "VENV": "my venv",
    }
    return os.environ | slurm | {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm_is_told_to_signal_early_and_to_allow_a_second_start() -> None:
    lines = (ROOT / "launch" / "slurm_gpu.sh").read_text().splitlines()
    options = {
        line.split()[1].split("=")[0]: line.split()[1]
        for line in lines
        if line.startswith("#SBATCH")
    }
    assert {"--requeue", "--exclusive", "--ntasks-per-node=1", "--open-mode=append"} <= set(
        options.values()
    )
    assert options["--signal"] == "--signal=B:TERM@300"  # B: to this script, which hands it on


def test_a_slurm_job_that_ends_by_itself_keeps_its_code_and_is_not_queued_again(
    tmp_path: Path,
) -> None:
    environment = fake_slurm(
        tmp_path, "echo GPUs $JAX_LOCAL_DEVICE_IDS; printf '%s|' \"$@\"; exit 6"
    )
    job = [str(ROOT / "launch" / "slurm_gpu.sh"), CONFIG, "--workdir=a run"]
    done = subprocess.run(job, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 6 and "requeue" not in done.stdout
    assert done.stdout.endswith(f"my venv/bin/python|-m|ssp_jax.main|{CONFIG}|--workdir=a run|"), (
        done.stdout
    )
    assert "--kill-on-bad-exit=1" in done.stdout  # one dead process ends the others
    assert "GPUs 0,1\n" in done.stdout  # both of the node


def test_a_slurm_job_near_its_time_limit_saves_and_queues_itself_again(tmp_path: Path) -> None:
    environment = fake_slurm(
        tmp_path, "trap 'echo saved; exit 0' TERM\necho ready\nwhile true; do sleep 0.05; done"
    )
    job = [str(ROOT / "launch" / "slurm_gpu.sh"), CONFIG]
    with subprocess.Popen(job, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        process.terminate()
        assert (
            process.stdout.read() == "saved\nscontrol requeue 77\n"
            and process.wait(timeout=30) == 0
        )


def test_prepare_prints_keys_that_a_run_takes(tmp_path: Path) -> None:
    done = launch("prepare.sh", str(tmp_path / "a folder"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" download ") == 4 and "--revision" in done.stdout
    keys = [line.strip() for line in done.stdout.splitlines() if line.startswith("  --config.")]
    config = parse_command_line(["--config=configs/default.py", *keys]).config
    assert (
        config.model.path == f"{tmp_path}/a folder/Qwen2.5-7B-Instruct"
        and "ssp" in config.data.eval_sets
    )
    assert paper_table.table_1(config.model.path)
    assert f"--local-dir {tmp_path}/a\\ folder/Qwen2.5-7B-Instruct " in done.stdout
    assert not (tmp_path / "a folder").exists()


def test_prepare_brings_the_vectors_of_the_papers_retriever(tmp_path: Path) -> None:
    printed = commands("prepare.sh", str(tmp_path), "--skip-model", "--vectors", "--dry-run")
    fetched = [words for words in printed if "PeterJinGo/wiki-18-e5-index" in words]
    assert len(fetched) == 2
    (imported,) = (words for words in printed if "import-faiss" in words)
    assert f"--out={tmp_path}/wiki-18.index" in imported and "--query_prefix=query: " in imported


def test_prepare_fetches_what_is_asked_for(tmp_path: Path) -> None:
    """With a hub of small files: the index that it builds is one that the printed keys open."""
    passages = (ROOT / "assets/tiny/corpus.jsonl").read_text().splitlines(keepends=True)[:50]
    (tmp_path / "wiki.gz").write_bytes(gzip.compress("".join(passages).encode()))
    for name, body in {
        "python": f"""if [[ $2 != huggingface_hub.cli.hf ]]; then exec {sys.executable} "$@"; fi
shift 3
echo "fetched $*"
while [[ $1 != --local-dir ]]; do [[ $1 != wiki* ]] || packed={tmp_path}/wiki.gz; shift; done
mkdir -p "$2"
if [[ -n ${{packed:-}} ]]; then cp "$packed" "$2/wiki-18.jsonl.gz"; fi""",
        "sha256sum": 'echo "checked $(cat)"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PYTHON": f"{tmp_path}/python", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = launch("prepare.sh", str(tmp_path / "files"), "--model=some/model", **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    fetched = [line.split()[1] for line in lines if line.startswith("fetched ")]
    assert fetched == ["some/model", "PeterJinGo/wiki-18-corpus", "Quark-LLM/SSP", "Quark-LLM/SSP"]
    assert any(
        line.startswith("checked ") and line.endswith("files/ssp/test.jsonl") for line in lines
    )
    wanted = next(line for line in lines if line.startswith("fetched some/model"))
    assert all(f"--include *{kind}" in wanted for kind in (".safetensors", *hf_files._SMALL_FILES))
    keys = dict(
        line.strip().removeprefix("--config.").split("=", 1)
        for line in lines
        if line.startswith("  --config")
    )
    settings = default.get_config().retriever
    same = {key: settings[key] for key in ("stemmer", "stopwords", "k1", "b")}
    assert len(search.open_retriever("", keys["retriever.index"], **same)) == 50
    answers = next(line.split()[2] for line in lines if line.startswith("fetched Quark-LLM/SSP"))
    assert keys["data.answers"].endswith(f"/files/ssp/{answers}")
    assert load_config(ROOT / "configs/qwen7b.py").data.answers == f"data/ssp/{answers}"
    done = launch("prepare.sh", "x", "--skip-model", "--skip-corpus", "--dry-run")
    assert done.stdout.count(" download ") == 2 and "open_retriever" not in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("tpu_pod.sh",),
        (*TPU, "v9-8", "--dry-run", "--", CONFIG),
        ("slurm_gpu.sh", "2"),
        ("slurm_gpu.sh", "--dry-run", "1", "8", "--", "--config=configs/none.py"),
        ("prepare.sh", "--what"),
        ("gke.sh",),
    ],
)
def test_a_wrong_call_is_code_2_and_tells_the_right_one(arguments: tuple[str, ...]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2 and ("launch/" in done.stderr or "; expected " in done.stderr)


@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (2, 1)])
def test_a_machine_of_skypilot_runs_one_process_of_the_run(
    tmp_path: Path, nodes: int, rank: int
) -> None:
    task: Any = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    program = tmp_path / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {name: str(value) for name, value in task["envs"].items()}
    environment |= {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": str(nodes),
        "SKYPILOT_NODE_RANK": str(rank),
    }
    done = subprocess.run(
        ["bash", "-ec", task["run"]], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "ssp_jax.main"], done.stderr
    given, spec = main.parse(words[2:])
    assert (spec.processes, spec.process) == (nodes, rank)
    assert given.workdir.startswith("/bucket/") and given.config.model.path
    assert spec.coordinator == "10.0.0.1:8476"
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra") or []
    assert task["envs"]["ACCELERATOR"] in extras and "/bucket" in task["file_mounts"]
    assert "launch/prepare.sh data" in task["setup"] and "requirements.txt" in task["setup"]


def test_the_jobset_agrees_with_itself() -> None:
    jobset: Any = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    name, container = jobset["metadata"]["name"], pod["containers"][0]
    labels = (jobset["metadata"]["labels"], job["template"]["metadata"]["labels"])
    assert {label["xpk.google.com/workload"] for label in labels} == {name}
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    slice_ = hardware.parse_topology(f"v5p:{topology}")
    assert job["parallelism"] == job["completions"] == slice_.hosts
    assert container["resources"]["limits"]["google.com/tpu"] == slice_.chip.per_host
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_jobset_is_a_run_that_survives_preemptions() -> None:
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    jobset: Any = yaml.safe_load(text)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0
    # Kubernetes takes a podFailurePolicy with restartPolicy Never only; 2 is the code of unusable
    # input.
    assert pod["restartPolicy"] == "Never" and job["podFailurePolicy"]["rules"][0]["onExitCodes"][
        "values"
    ] == [2]
    given = parse_command_line(pod["containers"][0]["args"])
    (bucket,) = (
        mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "bucket"
    )
    assert given.config.model.path and given.workdir.startswith(bucket["mountPath"] + "/")
    assert "bucket" in {volume["name"] for volume in pod["volumes"]}
    check_data(pod, given.config)
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert chosen_slice(pod) in {row[:2] for row in slices(text)}


def slices(text: str) -> list[tuple[str, ...]]:
    """The manifest's table, whose numbers are right: accelerator, topology, and more columns."""
    row = r"^# (\w+) ([\dx]+) +(\S+) +(?:([a-z]\w+) +)?([\dx]+) +(\d+) +(\d+)$"
    found = re.findall(row, text, flags=re.MULTILINE)
    assert {kind.lower() for kind, *_ in found} == set(hardware.TPUS)
    for kind, shape, _, _, topology, hosts, chips in found:
        slice_ = hardware.parse_topology(f"{kind.lower()}:{shape}")
        assert (topology, int(hosts), int(chips)) == (shape, slice_.hosts, slice_.chip.per_host)
    return [(accelerator, topology, more) for _, _, accelerator, more, topology, *_ in found]


def chosen_slice(pod: Any) -> tuple[str, str]:
    selector = pod["nodeSelector"]
    return (
        selector["cloud.google.com/gke-tpu-accelerator"],
        selector["cloud.google.com/gke-tpu-topology"],
    )


def check_data(pod: Any, config: Any) -> None:
    """What configs call data is a volume of the pod's own disk, filled before the run starts."""
    (copy,) = (c for c in pod["initContainers"] if c["name"] == "data")
    assert copy["command"][:4] == ["gcloud", "storage", "rsync", "--recursive"]
    (into,) = (m["mountPath"] for m in copy["volumeMounts"] if m["name"] == "data")
    assert copy["command"][5] == into
    assert {"name": "data", "emptyDir": {}} in pod["volumes"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    image = (ROOT / "launch/docker/Dockerfile").read_text()
    assert mounts["data"] == re.findall(r"^WORKDIR (\S+)$", image, flags=re.MULTILINE)[0] + "/data"
    read = (config.model.path, config.data.answers, config.retriever.corpus, config.retriever.index)
    assert all(path.startswith("data/") for path in read)


def test_through_pathways_one_process_drives_all_chips() -> None:
    text = (ROOT / "launch" / "gke_pathways.yaml").read_text()
    spec: Any = yaml.safe_load(text)["spec"]
    head, workers = (job["template"]["spec"] for job in spec["replicatedJobs"])
    assert spec["successPolicy"]["targetReplicatedJobs"] == [spec["coordinator"]["replicatedJob"]]
    pod, chips = head["template"]["spec"], workers["template"]["spec"]
    assert head["completions"] == 1 and "google.com/tpu" not in str(pod)

    containers = {c["name"]: c for c in (*pod["initContainers"], *pod["containers"])}
    manager, proxy = containers["pathways-rm"], containers["pathways-proxy"]
    own, worker = pod["containers"][0], chips["containers"][0]
    assert pod["initContainers"][0]["name"] == "data"
    assert manager["restartPolicy"] == proxy["restartPolicy"] == "Always"
    environment = {entry["name"]: entry.get("value", "") for entry in own["env"]}
    assert platform.pathways_will_be_used(environment)
    port = environment["JAX_BACKEND_TARGET"].rpartition(":")[2]
    assert f"--server_port={port}" in proxy["args"]
    address = "--resource_manager_address=$(PATHWAYS_HEAD):29001"
    assert "--server_port=29001" in manager["args"]
    assert address in proxy["args"] and address in worker["args"]
    assert manager["image"] == worker["image"]

    given = parse_command_line(own["args"])
    assert given.workdir.startswith("/bucket/") and given.config.engine.kv_cache_gib > 0
    check_data(pod, given.config)
    (rule,) = head["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == own["name"]
    accelerator, topology = chosen_slice(chips)
    (instance,) = (row[2] for row in slices(text) if row[:2] == (accelerator, topology))
    assert f"--instance_type={instance}:{topology}" in manager["args"]
    slice_ = hardware.parse_topology(f"v5p:{topology}")
    assert workers["parallelism"] == workers["completions"] == slice_.hosts
    assert worker["resources"]["limits"]["google.com/tpu"] == slice_.chip.per_host


def filled_in(folder: Path, name: str) -> str:
    """The manifest with names of somebody's own."""
    text = (ROOT / "launch" / name).read_text()
    for word in ("REGION", "PROJECT", "REPOSITORY", "BUCKET", "VERSION"):
        text = re.sub(rf"\b{word}\b", f"{word.lower()}-a", text)
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("name", ["gke_jobset.yaml", "gke_pathways.yaml"])
def test_paths_are_looked_for_before_gke_creates_anything(tmp_path: Path, name: str) -> None:
    printed = commands("gke.sh", filled_in(tmp_path, name), "--dry-run")
    looked = [" ".join(words[1:4]) for words in printed]
    assert looked[:2] == ["storage buckets describe", "storage ls gs://bucket-a/data"]
    assert looked[2] == "artifacts docker images" and "/ssp_jax:" in printed[2][5]
    assert [words[:3] for words in printed[3:]] == [
        ["kubectl", "apply", "--dry-run=server"],
        ["kubectl", "apply", "-f"],
    ]


@pytest.mark.parametrize("fault", ["", "buckets", "ls", "images", "--dry-run=server"])
def test_gke_creates_nothing_where_a_check_fails(tmp_path: Path, fault: str) -> None:
    for tool in ("gcloud", "kubectl"):
        (tmp_path / tool).write_text(
            f"#!/bin/bash\necho $* >> {tmp_path}/asked\n"
            f'[[ -z "{fault}" || " $* " != *" {fault} "* ]]\n'
        )
        (tmp_path / tool).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = launch("gke.sh", filled_in(tmp_path, "gke_jobset.yaml"), **environment)
    creates = "apply -f" in (tmp_path / "asked").read_text()
    assert (done.returncode, creates) == ((2, False) if fault else (0, True)), done.stderr
    assert not fault or done.stderr.startswith("gke.sh: ")


def test_a_manifest_that_nobody_has_filled_in_is_not_started(tmp_path: Path) -> None:
    done = launch("gke.sh", str(ROOT / "launch/gke_pathways.yaml"))
    assert done.returncode == 2 and done.stderr.endswith("has REGION; expected your own\n")
    manifest = Path(filled_in(tmp_path, "gke_jobset.yaml"))
    manifest.write_text(manifest.read_text().replace("configs/qwen7b.py", "configs/none.py"))
    done = launch("gke.sh", str(manifest))
    assert done.returncode == 2 and "--config=configs/none.py is not here" in done.stderr


def test_the_image_starts_what_is_there_and_can_be_made_for_all_accelerators() -> None:
    text = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    entry = json.loads(text.split("ENTRYPOINT ")[1])
    assert (
        os.access(ROOT / entry[0], os.X_OK) and "COPY . ." in text and '"jax[$ACCELERATOR]"' in text
    )
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    assert extras is not None and {"cuda12", "cuda13", "tpu"} <= set(extras)
    assert '".[pathways]"' in text and "\npathways = [" in (ROOT / "pyproject.toml").read_text()


def test_a_terminated_container_is_not_done(tmp_path: Path) -> None:
    """The run saves at SIGTERM and ends with 0; Kubernetes would take the job as complete."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\ntrap 'exit 0' TERM\necho ready\nwhile true; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    entry = str(ROOT / "launch" / "docker" / "entrypoint.sh")
    with subprocess.Popen([entry], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=30) == 143
    python.write_text("#!/bin/bash\nprintf '%s|' \"$@\"\nexit 7\n")
    done = subprocess.run(
        [entry, CONFIG, "a b"], env=environment, timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 7 and done.stdout == f"-m|ssp_jax.main|{CONFIG}|a b|"
