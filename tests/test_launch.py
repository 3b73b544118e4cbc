"""What the launch scripts would do, from their dry runs; nothing here reaches a cloud."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from ssp_jax import published
from ssp_jax.config import parse_command_line

SCRIPTS = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch" / "docker").glob("*.sh")]
CONFIG = "--config=configs/tiny.py"
TPU = ("tpu_pod.sh", "run", "ssp", "us-east5-a")


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


# Splits each line as bash does, which has printed it with %q.
SPLIT = r"""while IFS= read -r line; do eval "words=($line)"; printf '%s\0' "${words[@]}"; printf '\0'; done"""


def commands(*arguments: str) -> list[list[str]]:
    """The printed commands, word by word."""
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    split = subprocess.run(["bash", "-c", SPLIT], input=done.stdout, capture_output=True, text=True, timeout=60)
    return [words.split("\0") for words in split.stdout.split("\0\0") if words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shellcheck_clean(script: Path) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def test_a_tpu_run_creates_installs_starts_and_shows_the_log() -> None:
    printed = commands(*TPU, "v5p-16", "--spot", "--dry-run", "--", CONFIG, "--workdir=gs://bucket/a run")
    verbs = [next(w for w in words if w in ("describe", "create", "archive", "scp", "ssh")) for words in printed]
    assert verbs == ["describe", "create", "archive", "scp", "ssh", "ssh", "ssh", "ssh"]
    create, install, start, logs = printed[1], printed[4], printed[5], printed[6]
    assert {"ssp", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= set(create)
    assert all("--zone=us-east5-a" in words for words in printed if words[0] == "gcloud")
    assert "--worker=all" in install and "jax[tpu]" in install[-1]
    assert "--worker=all" in start and CONFIG in start[-1] and "ssp_jax.main" in start[-1]
    assert "--worker=0" in logs and "run.log" in logs[-1]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v5p-16", "v2-alpha-tpuv5"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_each_generation_has_its_runtime(kind: str, runtime: str) -> None:
    create = commands(*TPU, kind, "--dry-run", "--", CONFIG)[1]
    assert f"--runtime-version={runtime}" in create and "--spot" not in create


def test_a_slice_is_deleted_whole() -> None:
    assert commands("tpu_pod.sh", "delete", "ssp", "us-east5-a", "--dry-run") == [
        ["gcloud", "compute", "tpus", "queued-resources", "delete", "ssp", "--force", "--quiet", "--zone=us-east5-a"]
    ]


def fake_gcloud(folder: Path, *states: str) -> dict[str, str]:
    """A gcloud on PATH that reports these states one after the other and then ACTIVE, and logs what it was asked."""
    (folder / "states").write_text("".join(f"{state}\n" for state in states))
    script = folder / "gcloud"
    script.write_text(
        f"""#!/bin/bash
cd {shlex.quote(str(folder))}
case "$*" in
  *describe*) if [ -s states ]; then head -n 1 states; sed -i 1d states; else echo ACTIVE; fi ;;
  *--command=cat*) echo 3 ;;
  *) printf '%s\\n' "$4 $5 $6" >> asked ;;
esac
"""
    )
    script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "POLL": "0", "TMPDIR": str(folder)}


def test_a_preempted_slice_is_made_anew_and_the_exit_code_is_the_runs(tmp_path: Path) -> None:
    states = ("WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "PROVISIONING")
    done = launch(*TPU, "v6e-16", "--", CONFIG, **fake_gcloud(tmp_path, *states))
    assert done.returncode == 3, done.stdout + done.stderr
    asked = [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]
    once = ["scp", "ssh", "ssh", "ssh"]
    assert asked == [*once, "delete", "create", *once], done.stdout


def test_a_slurm_job_has_one_process_per_node_with_all_gpus() -> None:
    submit, run, *_, requeue = commands("slurm_gpu.sh", "--dry-run", "2", "8", "--time=24:00:00", "--", CONFIG)
    assert submit[0] == "sbatch" and {"--nodes=2", "--gpus-per-node=8", "--time=24:00:00"} <= set(submit)
    assert run[0] == "srun" and "--export=ALL,JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in run
    assert run[-3:] == ["-m", "ssp_jax.main", CONFIG] and requeue[-3:] == ["scontrol", "requeue", "JOB"]
    assert "--ntasks-per-node=1" in (ROOT / "launch" / "slurm_gpu.sh").read_text()


def test_a_slurm_job_near_its_time_limit_saves_and_queues_itself_again(tmp_path: Path) -> None:
    for name, body in {
        "srun": "trap 'echo saved; exit 0' TERM\necho ready\nwhile true; do sleep 0.05; done",
        "scontrol": 'echo "scontrol $*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "2", "SSP_JAX_SUBMITTED": "yes"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = [str(ROOT / "launch" / "slurm_gpu.sh"), CONFIG]
    with subprocess.Popen(job, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        process.terminate()
        assert process.stdout.read() == "saved\nscontrol requeue 77\n" and process.wait(timeout=30) == 0


def test_prepare_prints_keys_that_a_run_takes(tmp_path: Path) -> None:
    done = launch("prepare.sh", str(tmp_path / "a folder"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" download ") == 4 and "--revision" in done.stdout
    keys = [line.strip() for line in done.stdout.splitlines() if line.startswith("  --config.")]
    config = parse_command_line(["main.py", "--config=configs/default.py", *keys]).config
    assert config.model.path == f"{tmp_path}/a folder/model" and "ssp" in config.data.eval_sets
    assert not (tmp_path / "a folder").exists()


@pytest.mark.parametrize(
    "arguments",
    [("tpu_pod.sh",), (*TPU, "v9-8", "--dry-run", "--", CONFIG), ("slurm_gpu.sh", "2"), ("prepare.sh", "--what")],
)
def test_a_wrong_call_is_code_2_and_tells_the_right_one(arguments: tuple[str, ...]) -> None:
    done = launch(*arguments)
    assert done.returncode == 2 and "launch/" in done.stderr or "expected v5p-N" in done.stderr


def test_the_jobset_agrees_with_itself() -> None:
    jobset: Any = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    name, container = jobset["metadata"]["name"], pod["containers"][0]
    labels = (jobset["metadata"]["labels"], job["template"]["metadata"]["labels"])
    assert {label["xpk.google.com/workload"] for label in labels} == {name}
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    slice_ = published.parse_topology(f"v5p:{topology}")
    assert job["parallelism"] == job["completions"] == slice_.hosts
    assert container["resources"]["limits"]["google.com/tpu"] == slice_.chip.per_host
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_a_terminated_container_is_not_done(tmp_path: Path) -> None:
    """The run saves at SIGTERM and ends with 0; Kubernetes would take the job as complete."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\ntrap 'exit 0' TERM\necho ready\nwhile true; do sleep 0.05; done\n")
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    entry = str(ROOT / "launch" / "docker" / "entrypoint.sh")
    with subprocess.Popen([entry], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(timeout=30) == 143
    python.write_text("#!/bin/bash\nexit 7\n")
    assert subprocess.run([entry], env=environment, timeout=30).returncode == 7
