"""The files that run stent elsewhere: what they refer to exists, what matters is set.

Nothing here starts anything; tests/e2e/test_deployment.py runs their commands.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from stent import Settings
from tests.deployment import (
    COMPOSE,
    KUBERNETES,
    ROOT,
    UNIT,
    Instruction,
    compose,
    container,
    dockerfile,
    manifest,
    manifests,
    parse,
    seconds,
    unit,
    unit_command,
    unit_environment,
)

PASSWORD = {"POSTGRES_PASSWORD": "cafe"}
# What a drain may take beyond `drain_timeout`: its last writes, closing connections.
DRAIN_REST_SECONDS = 30
DRAIN_SECONDS = Settings().drain_timeout.total_seconds() + DRAIN_REST_SECONDS


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose(PASSWORD)["services"]
    return found


# docker-compose.yml


def test_compose_runs_a_fleet_and_the_job() -> None:
    """Postgres, the migration, two workers, and the job that ends."""
    found = services()
    assert set(found) == {"postgres", "migrate", "worker", "flights"}
    assert found["worker"]["deploy"]["replicas"] == 2
    for name in ("postgres", "worker"):
        assert found[name]["restart"] == "unless-stopped"
    for name in ("migrate", "flights"):
        assert found[name]["restart"] not in ("always", "unless-stopped")


def test_compose_holds_no_password() -> None:
    """It must be set outside, and is the same for all."""
    for missing in ({}, {"POSTGRES_PASSWORD": ""}):
        with pytest.raises(KeyError, match=r"docker-compose\.md"):
            compose(missing)
    found = services()
    assert found["postgres"]["environment"]["POSTGRES_PASSWORD"] == "cafe"
    for name in ("migrate", "worker", "flights"):
        url = found[name]["environment"]["STENT_DATABASE_URL"]
        assert url == "postgresql://stent:cafe@postgres:5432/stent"
    postgres = found["postgres"]["environment"]
    assert (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"]) == ("stent", "stent")
    assert "\n.env\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")


def test_compose_waits_for_what_it_needs() -> None:
    """Conditions name services that exist and can come true."""
    found = services()
    for service in found.values():
        for name, wanted in service.get("depends_on", {}).items():
            other = found[name]
            match wanted["condition"]:
                case "service_healthy":
                    assert other["healthcheck"]["test"][0] == "CMD"
                case "service_completed_successfully":
                    assert other["restart"] != "unless-stopped"
                case other_condition:
                    pytest.fail(f"unknown condition {other_condition}")
    assert found["worker"]["depends_on"].keys() == {"migrate"}
    assert found["flights"]["depends_on"].keys() == {"worker"}


def test_compose_volumes_are_declared_and_shared() -> None:
    """Data outlives the containers; the job's directory is seen by all workers."""
    document = compose(PASSWORD)
    mounts = {
        name: dict(volume.split(":") for volume in service.get("volumes", []))
        for name, service in document["services"].items()
    }
    assert {v for mount in mounts.values() for v in mount} == set(document["volumes"])
    assert mounts["postgres"] == {"postgres-data": "/var/lib/postgresql"}
    assert mounts["worker"] == mounts["flights"] == {"work": "/work"}
    assert "/work" in services()["flights"]["command"]


def test_compose_publishes_to_this_machine_only() -> None:
    """The database is not offered to the network."""
    for service in services().values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_compose_gives_a_drain_its_time() -> None:
    """A worker is not killed while it finishes what it runs."""
    assert seconds(services()["worker"]["stop_grace_period"]) > DRAIN_SECONDS


@pytest.mark.parametrize("name", ["migrate", "worker", "flights"])
def test_compose_commands_parse(name: str) -> None:
    """The command line knows what they say."""
    parse(services()[name]["command"])


def test_compose_builds_the_image_of_the_repository() -> None:
    """All services of stent are one image."""
    for name in ("migrate", "worker", "flights"):
        service = services()[name]
        assert (COMPOSE.parent / service["build"]["dockerfile"]).is_file()
        assert service["image"] == "stent-flights:local"
        assert service["read_only"] is True


# workers/Dockerfile


def instructions(name: str, stage: int | None = None) -> list[Instruction]:
    return [
        one
        for one in dockerfile()
        if one.name == name and (stage is None or one.stage == stage)
    ]


def copied() -> list[tuple[str, int]]:
    """What is copied from the repository, and in which stage."""
    return [
        (word, one.stage)
        for one in instructions("COPY")
        if not one.words.startswith("--from")
        for word in one.words.split()[:-1]
    ]


def test_the_image_is_slim_and_not_root() -> None:
    """Its user is a number that Kubernetes can check, and comes before what runs."""
    last = dockerfile()[-1].stage
    for base in instructions("FROM"):
        assert re.match(r"python:3\.\d+-slim\b", base.words)
    (user,) = instructions("USER")
    (entry,) = instructions("ENTRYPOINT")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.words)
    assert user.stage == entry.stage == last
    assert dockerfile().index(user) < dockerfile().index(entry)


def test_the_image_hears_its_signal() -> None:
    """No shell is process 1, and the signal is the one that drains."""
    (entry,) = instructions("ENTRYPOINT")
    (command,) = instructions("CMD")
    assert entry.exec_form == ["stent"]
    assert [one.words for one in instructions("STOPSIGNAL")] == ["SIGTERM"]
    parse(command.exec_form)
    assert command.exec_form == services()["worker"]["command"]


def test_the_image_checks_itself_as_compose_does() -> None:
    """One way to ask whether a worker is ready."""
    (check,) = instructions("HEALTHCHECK")
    _, _, words = check.words.partition(" CMD ")
    expected = services()["worker"]["healthcheck"]["test"]
    assert Instruction(1, "CMD", words).exec_form == expected[1:]


def test_the_image_copies_what_is_there() -> None:
    """Each source exists, and the ignore file lets it through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    for source, _ in copied():
        path = source.removeprefix("./")
        assert (ROOT / path).exists(), source
        assert f"!{path}" in rules
    for private in (".git", ".venv", ".env", ".stent", "tests"):
        assert not any(fnmatch.fnmatch(f"!{private}", rule) for rule in rules[1:])


@pytest.mark.timeout(60)
def test_the_image_has_what_its_installation_needs(tmp_path: Path) -> None:
    """The package builds from what is copied; no Postgres comes with it."""
    for source, stage in copied():
        if stage == 0:
            place = ROOT / source
            target = tmp_path / source
            if place.is_dir():
                shutil.copytree(place, target)
            else:
                shutil.copy(place, target)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert list((tmp_path / "dist").glob("*.whl"))
    (install,) = [
        one.words for one in instructions("RUN") if "pip install" in one.words
    ]
    extras = re.search(r"'\.\[([\w,]*)\]'", install)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = set(project["project"]["optional-dependencies"])
    assert set(extras[1].split(",")) <= known - {"local"}


# workers/systemd


def test_the_unit_says_what_stent_does() -> None:
    """It is told when the worker serves and lives, and stops it as it drains."""
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert seconds(service["WatchdogSec"]) >= 10
    assert service["KillSignal"] == "SIGTERM"
    # Children are told by their parent, and none is left behind.
    assert service["KillMode"] == "mixed"
    assert seconds(service["TimeoutStopSec"]) > DRAIN_SECONDS
    assert service["Restart"] == "always"
    assert unit()["Unit"]["StartLimitIntervalSec"] == "0"


def test_the_unit_is_hardened() -> None:
    """No root, no new rights, nothing to write but its own directory."""
    service = unit()["Service"]
    assert service["User"] not in ("", "root", "0")
    assert service["CapabilityBoundingSet"] == ""
    assert service["NoNewPrivileges"] == service["PrivateTmp"] == "true"
    assert service["ProtectSystem"] == "strict"
    assert service["ProtectHome"] == "true"
    assert "AF_UNIX" in service["RestrictAddressFamilies"].split()


def test_the_unit_keeps_the_password_out_of_sight() -> None:
    """It is in a file for root alone, not on the command line or in the unit."""
    service = unit()["Service"]
    assert service["EnvironmentFile"] == "/etc/stent/%i.env"
    assert "STENT_DATABASE_URL" not in UNIT.read_text(encoding="utf-8")
    environment = unit_environment()
    assert "STENT_DATABASE_URL" in environment
    assert environment["STENT_DATABASE_URL"] not in unit_command(environment)


def test_the_command_of_the_unit_parses() -> None:
    """With the words of the example."""
    program, *words = unit_command(unit_environment())
    assert program == "/opt/stent/bin/stent"
    parse(words)
    assert words[:2] == ["worker", "orders.workflows"]
    assert "--concurrency" in words


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not on this machine"
)
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Not a word of complaint; the tests above hold without systemd, too."""
    program = tmp_path / "stent"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    text = UNIT.read_text(encoding="utf-8").replace(
        "/opt/stent/bin/stent", str(program)
    )
    instance = tmp_path / "stent-worker@orders.service"
    instance.write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(instance)],
        check=False,
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if instance.name in line]
    assert (done.returncode, said) == (0, [])


# workers/kubernetes


def test_kubernetes_has_its_objects() -> None:
    """Each once, and the kustomization lists the files of all but the job."""
    assert sorted(one["kind"] for one in manifests()) == [
        "Deployment",
        "Job",
        "PodDisruptionBudget",
        "ScaledObject",
        "TriggerAuthentication",
    ]
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))
    files = {file.name for file in KUBERNETES.glob("*.yaml")}
    assert set(listed["resources"]) == files - {
        "kustomization.yaml",
        "migrate-job.yaml",
    }
    (image,) = listed["images"]
    assert image["name"] == container("Deployment")["image"]
    assert container("Job")["image"] == f"{image['newName']}:{image['newTag']}"


def test_kubernetes_selectors_find_the_workers() -> None:
    """The same labels everywhere, and the scaler names the deployment."""
    deployment = manifest("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest(kind)["spec"]["selector"]["matchLabels"] == labels
    scaled = manifest("ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]
    assert 1 <= scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    budget = manifest("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] < scaled["minReplicaCount"]


def test_kubernetes_probes_ask_the_health_port() -> None:
    """Ready decides about readiness alone; a missing database kills no worker."""
    found = container("Deployment")
    (port,) = found["ports"]
    options = dict(zip(found["args"], found["args"][1:], strict=False))
    assert options["--health"] == f"0.0.0.0:{port['containerPort']}"
    paths = {
        name: found[name]["httpGet"]["path"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {
        "startupProbe": "/live",
        "readinessProbe": "/ready",
        "livenessProbe": "/live",
    }
    for name in paths:
        assert found[name]["httpGet"]["port"] == port["name"]
    liveness = found["livenessProbe"]
    patience = liveness["periodSeconds"] * liveness["failureThreshold"]
    assert patience > Settings().lease.total_seconds()


def test_kubernetes_lets_a_worker_drain() -> None:
    """New ones first, and time enough to finish."""
    spec = manifest("Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > DRAIN_SECONDS


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_kubernetes_containers_are_confined(kind: str) -> None:
    """No root, no rights, a bound on memory, secrets by reference."""
    pod = manifest(kind)["spec"]["template"]["spec"]
    found = container(kind)
    parse(found["args"])
    user = pod["securityContext"]["runAsUser"]
    assert [one.words for one in instructions("USER")] == [f"{user}:{user}"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert found["securityContext"]["allowPrivilegeEscalation"] is False
    assert found["securityContext"]["readOnlyRootFilesystem"] is True
    assert found["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert found["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in found["resources"]["limits"]
    environment = {
        one["name"]: one["valueFrom"]["secretKeyRef"] for one in found["env"]
    }
    assert environment["STENT_DATABASE_URL"] == {"name": "stent-database", "key": "url"}
    assert environment["STENT_DIRECT_URL"]["optional"] is True


def test_kubernetes_migrates_before() -> None:
    """A job that ends, is repeated when it fails, and can be created each release."""
    job = manifest("Job")
    assert container("Job")["args"] == ["db", "migrate"]
    assert "generateName" in job["metadata"]
    assert job["spec"]["backoffLimit"] >= 1
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_kubernetes_scales_on_the_view() -> None:
    """By the scaler that reads Postgres, with a secret, at a worker's slots."""
    (trigger,) = manifest("ScaledObject")["spec"]["triggers"]
    assert trigger["type"] == "postgresql"
    authentication = manifest("TriggerAuthentication")
    name = authentication["metadata"]["name"]
    assert trigger["authenticationRef"]["name"] == name
    (secret,) = authentication["spec"]["secretTargetRef"]
    assert secret["parameter"] == "connection"
    assert "from stent.queue_depth" in trigger["metadata"]["query"]
    target = trigger["metadata"]["targetQueryValue"]
    assert target == str(Settings().max_concurrency)


def test_what_is_run_exists() -> None:
    """The module that image, compose and manifests name."""
    modules = {
        services()["worker"]["command"][1],
        container("Deployment")["args"][1],
        services()["flights"]["command"][1].partition(":")[0],
    }
    for module in modules:
        assert find_spec(module) is not None
