"""The Helm chart, rendered by Helm's own library: right by the schemas, and the same as the manifests beside it."""

import re
import tomllib
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.test_deploy import CUSTOM_KINDS, SETTINGS, custom_object, manifests, model_of
from tests.support.helm import CHART, helm
from tests.support.paths import ROOT
from worker.amqp.topology import QueueNames

pytest.importorskip("helm_python", reason="Helm's library is there for x86-64 alone")

MODES = ("none", "scaledObject", "scaledJob")
# By hand: what a release adds to the labels of its objects.
INSTANCE = {"app.kubernetes.io/instance": "darkroom"}


@cache
def objects(mode: str) -> dict[tuple[str, str], Any]:
    """Render the release `darkroom` with a scaling mode; map its objects by kind and name."""
    return loaded(helm({"scaling": {"mode": mode}})["rendered"])


def loaded(rendered: dict[str, str]) -> dict[tuple[str, str], Any]:
    texts = [text for name, text in rendered.items() if not name.endswith(".txt")]
    found = [one for text in texts for one in yaml.safe_load_all(text) if one]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def pod_of(mode: str) -> Any:
    if mode == "scaledJob":
        return objects(mode)["ScaledJob", "darkroom"]["spec"]["jobTargetRef"]["template"]["spec"]
    return objects(mode)["Deployment", "darkroom"]["spec"]["template"]["spec"]


def test_linter_of_helm_finds_nothing_but_the_missing_icon() -> None:
    report = helm({})["lint"]

    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("mode", MODES)
def test_every_object_of_the_chart_is_right_by_its_schema(mode: str) -> None:
    for (kind, _), one in objects(mode).items():
        if kind in CUSTOM_KINDS:
            given = custom_object(one)
            read = model_of(kind).model_validate(given)
            assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == given
        else:
            kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("mode", MODES)
def test_chart_runs_the_pod_of_the_manifests(mode: str) -> None:
    pod = manifests()["Deployment", "darkroom"]["spec"]["template"]["spec"]
    if mode == "scaledJob":
        pod = manifests()["ScaledJob", "darkroom"]["spec"]["jobTargetRef"]["template"]["spec"]
    [container] = pod["containers"]
    image = {"image": "darkroom:cuda", "imagePullPolicy": "IfNotPresent"}

    assert pod_of(mode) == pod | {"containers": [container | image]}


@pytest.mark.parametrize(("mode", "kind"), [("scaledObject", "ScaledObject"), ("scaledJob", "ScaledJob")])
def test_chart_is_scaled_as_the_manifests_are(mode: str, kind: str) -> None:
    made, wanted = objects(mode)[kind, "darkroom"]["spec"], manifests()[kind, "darkroom"]["spec"]

    def by_queue(spec: Any) -> Any:
        return {trigger["metadata"]["queueName"]: trigger for trigger in spec["triggers"]}

    assert by_queue(made) == by_queue(wanted)
    others = wanted.keys() - {"triggers", "jobTargetRef"}
    assert {name: made[name] for name in others} == {name: wanted[name] for name in others}
    authentication = ("TriggerAuthentication", "darkroom")
    assert objects(mode)[authentication]["spec"] == manifests()[authentication]["spec"]


@pytest.mark.parametrize("mode", ["scaledObject", "scaledJob"])
@pytest.mark.parametrize(
    "values",
    [
        {"scaling": {"queues": ["image_generation", "express"]}},
        {"scaling": {}, "settings": {"RABBITMQ_QUEUES": "express:3, image_generation:1,"}},
    ],
    ids=["named", "of the settings"],
)
def test_each_queue_of_jobs_calls_for_workers_and_the_shared_ones_once(values: dict[str, Any], mode: str) -> None:
    made = helm(values | {"scaling": values["scaling"] | {"mode": mode}})
    [scaled] = [one for one in yaml.safe_load_all(made["rendered"]["darkroom/templates/scaling.yaml"]) if one]
    triggers = [trigger["metadata"] for trigger in scaled["spec"]["triggers"]]
    names = QueueNames("image_generation", others=("express",))

    assert [kind for kind in CUSTOM_KINDS if kind.lower() == mode.lower()] == [scaled["kind"]]
    assert sorted((trigger["queueName"], trigger["value"]) for trigger in triggers) == sorted(
        [*((name, "24") for name in (*names.job_queues, names.recover)), (names.outbox, "100000")]
    )
    assert model_of(scaled["kind"]).model_validate(custom_object(scaled))


def test_queue_that_no_worker_could_have_is_refused() -> None:
    assert "/scaling/queues/0" in helm({"scaling": {"queues": ["express:3"]}})["error"]


def test_notes_say_what_a_check_beside_a_worker_costs() -> None:
    notes = {mode: helm({"scaling": {"mode": mode}})["rendered"]["darkroom/templates/NOTES.txt"] for mode in MODES}

    for mode, text in notes.items():
        assert ("darkroom check" in text) == ("second time" in text) == (mode != "scaledJob")
        assert "/health/ready" in text


def test_other_objects_are_those_of_the_manifests_with_the_release_s_labels() -> None:
    made = objects("scaledObject")

    for key in (("PersistentVolumeClaim", "darkroom-models"), ("PrometheusRule", "darkroom")):
        assert made[key]["spec"] == manifests()[key]["spec"]
    assert made["ConfigMap", "darkroom"]["data"] == manifests()["ConfigMap", "darkroom"]["data"]
    selector = manifests()["Service", "darkroom"]["spec"]["selector"] | INSTANCE
    assert made["Service", "darkroom"]["spec"]["selector"] == selector
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        assert made[kind, "darkroom"]["spec"]["selector"]["matchLabels"] == selector
    assert selector.items() <= made["Deployment", "darkroom"]["spec"]["template"]["metadata"]["labels"].items()
    kinds = {kind for kind, _ in made}
    assert {kind for kind, _ in manifests()} - kinds == {"Kustomization", "Secret", "ScaledJob"}


def test_mode_without_keda_has_a_number_of_replicas_and_needs_none_of_its_kinds() -> None:
    assert objects("none")["Deployment", "darkroom"]["spec"]["replicas"] == 1
    assert "replicas" not in objects("scaledObject")["Deployment", "darkroom"]["spec"]
    assert {kind for kind, _ in objects("none")} & {"ScaledObject", "ScaledJob", "TriggerAuthentication"} == set()


def test_the_example_of_the_secret_has_what_the_values_promise() -> None:
    text = (CHART / "values.yaml").read_text()
    [promise] = re.findall(r"^# A Secret with (.+?)\nexistingSecret", text, re.MULTILINE | re.DOTALL)
    promised = set(re.findall(r"[A-Z]+_[A-Z_]+", promise))

    assert promised == set(manifests()["Secret", "darkroom"]["stringData"])


def test_values_reach_the_settings_and_are_known() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    made = helm({"settings": {"RABBITMQ_QUEUE": "pictures", "INFERENCE_STEPS": 30, "EMBED_METADATA": False}})

    texts = "\n".join(made["rendered"].values())
    assert set(defaults) <= set(SETTINGS)
    for line in ('INFERENCE_STEPS: "30"', 'EMBED_METADATA: "false"', "queueName: pictures.recover"):
        assert line in texts


def test_value_of_another_name_is_refused() -> None:
    assert "additional properties" in helm({"scalling": {}})["error"].lower()
    assert "mode" in helm({"scaling": {"mode": "auto"}})["error"]


def test_release_of_another_name_is_in_the_names_of_its_objects() -> None:
    rendered = helm({}, release="blue")["rendered"]

    assert "name: blue-darkroom-models" in rendered["darkroom/templates/persistentvolumeclaim.yaml"]


def test_chart_names_the_version_of_the_worker() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version


def test_documented_values_for_two_nodes_with_two_gpus_each_render_what_the_section_says() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    [section] = re.findall(r"^## Kubernetes, two nodes with two GPUs each\n(.+?)^## ", text, re.MULTILINE | re.DOTALL)
    [given] = re.findall(r"^```yaml\n(.+?)^```", section, re.MULTILINE | re.DOTALL)
    values = yaml.safe_load(given)
    made = helm(values)
    assert "error" not in made, made["error"]
    assert made["lint"]["errors"] == []
    specs = {key: one.get("spec") for key, one in loaded(made["rendered"]).items()}
    scaled, claim = specs["ScaledJob", "darkroom"], specs["PersistentVolumeClaim", "darkroom-models"]
    [container] = scaled["jobTargetRef"]["template"]["spec"]["containers"]

    assert set(values["settings"]) <= set(SETTINGS)
    assert scaled["maxReplicaCount"] == 2 * 2
    assert container["args"] == ["run", "--exit-when-idle", str(values["scaling"]["idleSeconds"])]
    assert container["image"] == "registry.example.com/darkroom:cuda"
    assert container["resources"] == values["resources"]
    assert (claim["storageClassName"], claim["accessModes"]) == ("nfs", ["ReadWriteMany"])
    assert {kind for kind, _ in specs} & {"PodMonitor", "PrometheusRule", "Deployment"} == set()
    chart = CHART.relative_to(ROOT)
    assert f"helm install darkroom {chart} --namespace images --values two-nodes.yaml" in section
