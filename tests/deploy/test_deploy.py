"""Compose and Kubernetes: right by their own schemas, and in step with the code, the image and each other."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from config.broker import BrokerSettings
from config.model import ModelSettings
from config.service import ServiceSettings
from config.settings import SECTIONS
from examples.demo import gallery
from examples.parts.ports import free_port
from examples.parts.processes import ServerProcess
from examples.parts.seaweedfs import SOCKET_FOLDER
from tests.support import prometheus_rule
from tests.support.paths import ROOT
from tests.support.promql import DEPLOY, PROMETHEUS, alert_rules
from worker.amqp.topology import QueueNames
from worker.cli.check.broker_versions import TESTED
from worker.wiring import EXTRA_PREFETCH

SETTINGS = {
    str(field.validation_alias): field for section in SECTIONS.values() for field in section.model_fields.values()
}
REQUIRED = {name for name, field in SETTINGS.items() if field.is_required()}
PORT = ServiceSettings.model_fields["metrics_port"].default
GRACE_SECONDS = ServiceSettings.model_fields["shutdown_grace_seconds"].default
NAMES = QueueNames(BrokerSettings.model_fields["queue"].default)
CUSTOM_KINDS = {
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
    "ScaledJob": "cloudcoil.models.keda.v1alpha1",
    "TriggerAuthentication": "cloudcoil.models.keda.v1alpha1",
    "PodMonitor": "cloudcoil.models.prometheus_operator.v1",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1",
}
HEALTH_PATHS = re.findall(r'case "([^"]+)"', (ROOT / "worker" / "monitoring" / "http_server.py").read_text())
VARIABLE = re.compile(r"\$\{(\w+)(:[-?])?([^}]*)\}")


def model_of(kind: str) -> Any:
    """Import a custom kind's model: thousands of classes, for the process that validates and none that collects."""
    return getattr(import_module(CUSTOM_KINDS[kind]), kind)


# --- Compose


def compose_text() -> str:
    return (DEPLOY / "compose.yaml").read_text()


@cache
def compose() -> dict[str, Any]:
    """Render the file as Compose does with the required variables alone, each set to its own name."""

    def value(found: re.Match[str]) -> str:
        name, kind, default = found.groups()
        return default if kind == ":-" else name.lower()

    return yaml.safe_load(VARIABLE.sub(value, compose_text()))  # type: ignore[no-any-return]


def services() -> dict[str, Any]:
    return compose()["services"]  # type: ignore[no-any-return]


def example_variables() -> dict[str, str]:
    lines = (DEPLOY / "compose.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))  # type: ignore[misc]


def test_compose_file_fits_the_specification() -> None:
    # The schema knows addresses only; `host-gateway` is Docker's own word for one.
    text = json.dumps(compose()).replace("host-gateway", "192.0.2.1")

    assert set(PyCompose.from_json(text).to_spec().services) == set(services())


@pytest.mark.parametrize("name", ["worker", "worker-cpu"])
def test_every_setting_of_a_worker_can_be_set_in_the_file_beside_compose(name: str) -> None:
    """What `environment` holds wins over `env_file`: it has to be taken from that file, or be decided on purpose."""
    [file] = services()[name]["env_file"]
    own = yaml.safe_load(compose_text())["x-worker"]["environment"]
    fixed = {variable for variable, value in own.items() if f"${{{variable}:" not in value}

    assert (file["path"], file["required"]) == (".env", False)
    assert services()[name]["environment"].keys() == own.keys() <= SETTINGS.keys() | {"GRAFANA_ADMIN_PASSWORD"}
    assert fixed == {"CACHE_DIR", "METRICS_PORT", "GRAFANA_ADMIN_PASSWORD"}


def test_compose_requirements_are_in_its_example_and_nothing_else() -> None:
    insisted = {name for name, kind, _ in VARIABLE.findall(compose_text()) if kind == ":?"}
    known = {*SETTINGS, "HF_TOKEN", "COMPOSE_PROFILES", "GRAFANA_ADMIN_PASSWORD"}

    assert insisted - set(example_variables()) == set()
    assert set(example_variables()) - known == set()
    assert insisted >= REQUIRED
    profiles = {profile for service in services().values() for profile in service.get("profiles", ())}
    assert example_variables()["COMPOSE_PROFILES"] in profiles == {"gpu", "cpu", "demo"}


def test_demo_has_every_value_it_needs_and_none_of_an_operator_s_settings() -> None:
    lines = (DEPLOY / "demo.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    insisted = {name for name, kind, _ in VARIABLE.findall(compose_text()) if kind == ":?"}

    assert insisted <= {name for name, value in given.items() if value}
    assert given["COMPOSE_PROFILES"] == "demo"
    assert given["COMPOSE_PROJECT_NAME"] != compose()["name"]
    assert services()["worker-demo"]["env_file"] == []
    assert given["BACKEND_API_URL"] == f"http://demo-backend:{gallery.PORT}"
    assert services()["demo-backend"]["ports"] == [f"127.0.0.1:{gallery.PORT}:{gallery.PORT}"]
    for name in ("demo-backend", "demo-publisher"):
        *_, module = services()[name]["entrypoint"]
        assert find_spec(module) is not None


def test_the_example_holds_no_secret() -> None:
    secrets = {name for name in example_variables() if re.search("PASS|SECRET|TOKEN", name)}

    assert secrets
    assert {example_variables()[name] for name in secrets} == {""}


def test_docker_waits_longer_than_a_worker_takes_to_stop() -> None:
    for name in ("worker", "worker-cpu"):
        grace = float(services()[name]["environment"]["SHUTDOWN_GRACE_SECONDS"])
        assert int(services()[name]["stop_grace_period"].removesuffix("s")) > grace


def test_only_the_gpus_worker_reserves_one_and_each_is_built_from_its_target() -> None:
    worker, worker_cpu = services()["worker"], services()["worker-cpu"]
    [device] = worker["deploy"]["resources"]["reservations"]["devices"]

    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
    assert "deploy" not in worker_cpu
    assert (worker["build"]["target"], worker_cpu["build"]["target"]) == ("cuda", "cpu")


def test_prometheus_scrapes_the_workers_and_the_broker() -> None:
    jobs = {
        job["job_name"]: job for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    }

    [where] = jobs["darkroom"]["dns_sd_configs"]
    assert where["port"] == PORT
    for name in ("worker", "worker-cpu"):
        assert services()[name]["networks"]["default"]["aliases"] == where["names"]
        assert services()[name]["environment"]["METRICS_PORT"] == str(PORT)
    assert jobs["rabbitmq"]["static_configs"] == [{"targets": ["rabbitmq:15692"]}]
    assert "rabbitmq_prometheus" in (DEPLOY / "rabbitmq" / "enabled_plugins").read_text()


def test_the_broker_is_no_older_than_what_the_tests_run_on() -> None:
    found = re.fullmatch(r"rabbitmq:(\d+)\.(\d+)-management", services()["rabbitmq"]["image"])

    assert found is not None
    assert (int(found[1]), int(found[2])) >= TESTED[-1]


def test_every_file_and_volume_that_is_mounted_exists() -> None:
    for service in services().values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            elif not source.startswith("/"):
                assert source in compose()["volumes"], source


def test_grafana_finds_the_dashboard_and_the_source_it_is_given() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    [provider] = yaml.safe_load((folder / "dashboards" / "darkroom.yaml").read_text())["providers"]
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]

    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services()["grafana"]["volumes"]
    assert source["url"] == "http://prometheus:9090"


def test_published_ports_are_bound_to_localhost() -> None:
    ports = [port for service in services().values() for port in service.get("ports", ())]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


# --- The store of the compose file, with the real program


@pytest.fixture
def composed_store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start the compose file's `store` on ports of its own; return the substitute of each of its addresses."""
    ports = {name: str(free_port()) for name in ("9333", "19333", "8888", "18888", "8333")}
    rest = [f"-{flag}={free_port()}" for flag in ("volume.port", "volume.port.grpc", "s3.port.grpc")]
    moved = {
        "-dir=/data": f"-dir={tmp_path}",
        "-ip=store": "-ip=127.0.0.1",
        "-ip.bind=0.0.0.0": "-ip.bind=127.0.0.1",
        "-s3.port=8333": f"-s3.port={ports['8333']}",
    }
    flags = [moved.get(flag, flag) for flag in services()["store"]["command"]]
    flags += [f"-master.port={ports['9333']}", f"-master.port.grpc={ports['19333']}"]
    flags += [f"-filer.port={ports['8888']}", f"-filer.port.grpc={ports['18888']}", *rest]
    server = ServerProcess(
        [str(Path(sys.executable).with_name("weed")), *flags],
        env={"HOME": str(tmp_path), "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        log=tmp_path / "log",
        cwd=tmp_path,
    )
    check = services()["store"]["healthcheck"]["test"][-1].replace("8333", ports["8333"])
    try:
        server.wait_until(lambda: _answers(check), timeout_seconds=60)
        yield ports
    finally:
        server.kill()
        for port in (*ports.values(), *(flag.split("=")[1] for flag in rest)):
            for socket in SOCKET_FOLDER.glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink()


def _answers(url: str) -> bool:
    script = f"import urllib.request as r; r.urlopen({url!r}, timeout=120)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_the_bucket_is_made_once_it_is_healthy_and_a_second_time_nothing_happens(
    composed_store: dict[str, str], tmp_path: Path
) -> None:
    [script] = services()["bucket"]["command"]
    for name, port in (("9333", "19333"), ("8888", "18888")):
        script = script.replace(f"store:{name}", f"127.0.0.1:{composed_store[name]}.{composed_store[port]}")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "BUCKET": "media", "HOME": str(tmp_path)}

    outputs = []
    for _ in range(2):
        done = subprocess.run(
            ["/bin/sh", "-c", script.replace("$$", "$")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)

    assert "created bucket media" in outputs[0]
    assert "created" not in outputs[1]


# --- Kubernetes


@cache
def manifests() -> dict[tuple[str, str], Any]:
    """Load every object by kind and name."""
    folder = DEPLOY / "kubernetes"
    found = [one for path in sorted(folder.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]
    return {(one["kind"], one.get("metadata", {}).get("name", "")): one for one in found}


def pod() -> dict[str, Any]:
    return manifests()["Deployment", "darkroom"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def container() -> dict[str, Any]:
    [only] = pod()["containers"]
    return only  # type: ignore[no-any-return]


def configured() -> dict[str, str]:
    """Return every variable a pod gets."""
    return manifests()["ConfigMap", "darkroom"]["data"] | manifests()["Secret", "darkroom"]["stringData"]  # type: ignore[no-any-return]


def custom_object(given: Any) -> Any:
    """Return the object without what its model cannot read: the quantities of a Job's pod."""
    given = deepcopy(given)
    if given["kind"] == "ScaledJob":
        del given["spec"]["jobTargetRef"]["template"]["spec"]["containers"][0]["resources"]
    return given


@pytest.mark.parametrize("key", [key for key in manifests() if key[0] not in (*CUSTOM_KINDS, "Kustomization")])
def test_every_object_of_kubernetes_is_right_by_its_schema(key: tuple[str, str]) -> None:
    kubernetes_validate.validate(manifests()[key], kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("key", [key for key in manifests() if key[0] in CUSTOM_KINDS])
def test_every_object_of_keda_and_prometheus_is_right_by_its_schema_and_has_no_field_beyond_it(
    key: tuple[str, str],
) -> None:
    given = custom_object(manifests()[key])

    read = model_of(key[0]).model_validate(given)

    # Unknown fields are dropped in reading, so they would be missing here.
    assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == given


def test_the_kustomization_has_every_file_but_the_examples() -> None:
    folder = DEPLOY / "kubernetes"
    examples = {path.name for path in folder.glob("*.example.yaml")}
    others = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"} - examples

    assert set(manifests()["Kustomization", ""]["resources"]) == others
    assert manifests()["Kustomization", ""]["images"][0]["name"] == container()["image"]


def test_pod_has_the_required_variables_and_no_unknown_one() -> None:
    assert set(configured()) <= {*SETTINGS, "HF_TOKEN"}
    assert set(configured()) >= REQUIRED
    sources = [next(iter(source.values()))["name"] for source in container()["envFrom"]]
    assert sources == ["darkroom", "darkroom"]


def test_no_service_of_the_namespace_can_set_a_variable_of_the_worker() -> None:
    assert pod()["enableServiceLinks"] is False


def test_probes_request_paths_that_the_worker_serves() -> None:
    [port] = container()["ports"]
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}

    assert port["containerPort"] == PORT
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/health/ready",
        "liveness": "/health/live",
        "readiness": "/health/ready",
    }
    for probe in probes.values():
        assert probe["httpGet"]["path"] in HEALTH_PATHS
        assert probe["httpGet"]["port"] == port["name"]
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600


def test_kubernetes_waits_longer_than_a_worker_takes_to_stop() -> None:
    assert pod()["terminationGracePeriodSeconds"] > float(configured()["SHUTDOWN_GRACE_SECONDS"]) >= GRACE_SECONDS


def test_a_pod_runs_as_the_images_user_may_write_only_its_volumes_and_has_one_gpu() -> None:
    image = (ROOT / "Dockerfile").read_text()
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}

    assert f"USER {pod()['securityContext']['runAsUser']}:" in image
    assert container()["securityContext"]["readOnlyRootFilesystem"] is True
    assert set(mounts) == {"/models", "/cache", "/tmp"}
    assert "emptyDir" in volumes[mounts["/cache"]]  # each pod's own
    assert ("PersistentVolumeClaim", volumes["models"]["persistentVolumeClaim"]["claimName"]) in manifests()
    cache_limit = int(volumes["cache"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert cache_limit > float(configured()["CACHE_MAX_GB"])
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("kind", ["ScaledObject", "ScaledJob"])
def test_keda_counts_the_queues_that_need_a_worker_by_what_a_worker_takes(kind: str) -> None:
    spec = manifests()[kind, "darkroom"]["spec"]
    values = {trigger["metadata"]["queueName"]: int(trigger["metadata"]["value"]) for trigger in spec["triggers"]}
    num_taken = ModelSettings.model_fields["max_concurrent_generations"].default + EXTRA_PREFETCH

    assert configured()["RABBITMQ_QUEUE"] == NAMES.jobs
    assert set(values) == {NAMES.jobs, NAMES.recover, NAMES.outbox}
    assert values[NAMES.jobs] == values[NAMES.recover] == 2 * num_taken
    assert {trigger["metadata"]["protocol"] for trigger in spec["triggers"]} == {"http"}


def test_the_scaled_job_finds_all_it_refers_to_where_it_stands_instead_of_the_files_it_names() -> None:
    folder, example = DEPLOY / "kubernetes", "scaledjob.example.yaml"
    comment = (folder / example).read_text().split("apiVersion", 1)[0]
    replaced = set(re.findall(r"\w+\.yaml", comment))
    resources = manifests()["Kustomization", ""]["resources"]
    files = [name for name in resources if name not in replaced] + [example]
    objects = [one for name in files for one in yaml.safe_load_all((folder / name).read_text())]
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    [scaled] = [one["spec"] for one in objects if one["kind"] in ("ScaledJob", "ScaledObject")]
    job_pod = scaled["jobTargetRef"]["template"]["spec"]

    assert replaced == {"deployment.yaml", "scaledobject.yaml", "poddisruptionbudget.yaml"} <= set(resources)
    assert {("TriggerAuthentication", trigger["authenticationRef"]["name"]) for trigger in scaled["triggers"]} <= names
    assert ("ServiceAccount", job_pod["serviceAccountName"]) in names
    assert ("ConfigMap", job_pod["containers"][0]["envFrom"][0]["configMapRef"]["name"]) in names
    claims = [volume["persistentVolumeClaim"] for volume in job_pod["volumes"] if "persistentVolumeClaim" in volume]
    assert {("PersistentVolumeClaim", claim["claimName"]) for claim in claims} <= names


def test_keda_owns_the_number_of_the_deployment_s_pods() -> None:
    spec = manifests()["ScaledObject", "darkroom"]["spec"]

    assert ("Deployment", spec["scaleTargetRef"]["name"]) in manifests()
    assert "replicas" not in manifests()["Deployment", "darkroom"]["spec"]


def test_pod_of_the_scaled_job_is_that_of_the_deployment_but_ends_when_it_is_idle() -> None:
    spec = deepcopy(manifests()["ScaledJob", "darkroom"]["spec"]["jobTargetRef"]["template"]["spec"])
    [only] = spec["containers"]
    command, option, seconds = only.pop("args")

    assert (command, option) == ("run", "--exit-when-idle")
    assert int(seconds) > 0
    assert spec.pop("restartPolicy") == "Never"
    assert spec == pod()


def test_alerts_of_kubernetes_and_of_the_chart_are_those_of_prometheus() -> None:
    assert prometheus_rule.MANIFEST.read_text() == prometheus_rule.manifest()
    assert prometheus_rule.CHART_FILE.read_text() == prometheus_rule.alerts()
    assert yaml.safe_load(prometheus_rule.manifest())["spec"] == {
        "groups": yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    }


def test_service_leads_to_the_port_of_the_pods_and_the_account_has_no_token() -> None:
    service = manifests()["Service", "darkroom"]["spec"]
    labels = manifests()["Deployment", "darkroom"]["spec"]["template"]["metadata"]["labels"]

    assert service["selector"].items() <= labels.items()
    assert [(port["port"], port["targetPort"]) for port in service["ports"]] == [
        (PORT, container()["ports"][0]["name"])
    ]
    assert ("ServiceAccount", pod()["serviceAccountName"]) in manifests()
    account = manifests()["ServiceAccount", pod()["serviceAccountName"]]
    assert (account["automountServiceAccountToken"], pod()["automountServiceAccountToken"]) == (False, False)


def test_keda_finds_its_address_in_a_secret_that_the_example_has() -> None:
    [reference] = manifests()["TriggerAuthentication", "darkroom"]["spec"]["secretTargetRef"]

    assert reference["parameter"] == "host"
    assert reference["key"] in manifests()["Secret", reference["name"]]["stringData"]


def test_the_pods_are_scraped_under_the_name_the_alerts_know() -> None:
    spec = manifests()["PodMonitor", "darkroom"]["spec"]
    [endpoint] = spec["podMetricsEndpoints"]
    [relabeling] = endpoint["relabelings"]
    known = {found for rule in alert_rules() for found in re.findall(r'job="([^"]+)"', rule["expr"])}

    assert spec["selector"]["matchLabels"].items() <= (
        manifests()["Deployment", "darkroom"]["spec"]["template"]["metadata"]["labels"].items()
    )
    assert endpoint["port"] == container()["ports"][0]["name"]
    assert {relabeling["replacement"]} == known


# --- All of them


def test_the_alert_for_missing_consumers_names_the_queues_that_need_some_and_the_one_that_all_workers_consume() -> None:
    [rule] = [rule["expr"] for rule in alert_rules() if rule["alert"] == "DarkroomNoConsumer"]
    [needing] = re.findall(r'queue=~"([^"]+)"', rule)

    assert [name for name in NAMES.everything if re.fullmatch(needing, name)] == [NAMES.jobs, NAMES.recover]
    assert re.findall(r'consumers\{queue="([^"]+)"', rule) == [NAMES.recover]


def test_the_documented_pattern_for_several_queues_matches_each_of_them_and_none_of_the_worker_s_but_recover() -> None:
    names = QueueNames(NAMES.jobs, others=("express",))
    [section] = re.findall(
        r"^### DarkroomNoConsumer\n(.+?)^###", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE | re.DOTALL
    )
    [pattern] = re.findall(r'queue=~"([^"]+)"', section)

    assert {name for name in names.everything if re.fullmatch(pattern, name)} == {*names.job_queues, names.recover}
