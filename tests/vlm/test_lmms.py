"""The plugin of lmms-eval against a stand-in of its interface; `test_lmms_eval` runs the real one."""

from __future__ import annotations

import abc
import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from qlip import QLIPError
from qlip.data.public.scene_questions import KINDS, SceneQuestions
from qlip.vlm import lmms
from qlip.vlm.chat import VisionChat
from qlip.vlm.conversations import Turn
from qlip.vlm.lmms import scenes

RED = Image.new("RGB", (64, 64), "red")


class Interface(abc.ABC):
    """What `lmms_eval.api.model.lmms` is to a model."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


class Chat:
    """Repeats the last turn, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def answers(self, conversations: Any, **settings: Any) -> list[str]:
        self.asked.append((conversations, settings))
        return [one.turns[-1].text.rpartition("\n")[2] for one in conversations]

    def likelihood(self, conversation: Any) -> tuple[float, bool]:
        self.asked.append(([conversation], {}))
        return -1.5, True


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`qlip.vlm.lmms.model` over the stand-in."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Interface  # type: ignore[attr-defined]
    yield importlib.import_module("qlip.vlm.lmms.model")
    sys.modules.pop("qlip.vlm.lmms.model")


@pytest.fixture
def model(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(VisionChat, "from_pretrained", lambda name, **options: Chat())
    found = module.QLIPVision(pretrained="x", batch_size="2")
    found.task_dict = {"pope": {"test": [{"text": f"question {number}"} for number in range(5)]}}
    return found


def messages(document: Any, **rounds: Any) -> Any:
    content = [{"type": "image", "url": RED}, {"type": "text", "text": document["text"]}]
    return [{"role": "user", "content": content}]


def request(number: int, **settings: Any) -> Any:
    return SimpleNamespace(args=("context", messages, settings, number, "pope", "test"))


def test_generate_until__answers_in_order_in_batches_of_equal_settings(model: Any) -> None:
    requests = [request(0, max_new_tokens=8), request(1), request(2, max_new_tokens=8), request(3, max_new_tokens=8)]
    assert model.generate_until(requests) == [f"question {number}" for number in range(4)]
    sizes = [len(conversations) for conversations, _ in model.chat.asked]
    assert sizes == [2, 1, 1]
    (conversation, _), settings = model.chat.asked[0]
    assert conversation.turns == (Turn("user", "<image>\nquestion 0"),) and conversation.images == (RED,)
    assert conversation.id == "pope 0"
    assert settings["max_tokens"] == 8 and settings["sampling"].temperature == 0


def test_generate_until__is_greedy_unless_samples_are_asked_for(model: Any) -> None:
    model.generate_until([request(0, temperature=0.7, do_sample=False), request(1, temperature=0.7, top_p=0.9)])
    first, second = (settings["sampling"] for _, settings in model.chat.asked)
    assert (first.temperature, second.temperature, second.top_p) == (0, 0.7, 0.9)
    model.generate_until([request(0, temperature=0, top_p=0, do_sample=False)])  # as some stock tasks say


def test_generate_until__cuts_at_the_first_end_text(model: Any) -> None:
    assert model.generate_until([request(0, until=["0", "tion"])]) == ["ques"]
    assert model.generate_until([request(0, until="absent")]) == ["question 0"]


def test_generate_until__raises_instead_of_an_empty_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(conversations: Any, **settings: Any) -> Any:
        raise QLIPError("pope 0: too long")

    with pytest.raises(QLIPError, match="num_beams 4"):
        model.generate_until([request(0, num_beams=4)])
    monkeypatch.setattr(model.chat, "answers", fails)
    with pytest.raises(QLIPError, match="too long"):
        model.generate_until([request(0)])


def test_generate_until__tells_of_settings_that_it_does_not_follow(model: Any) -> None:
    with pytest.warns(UserWarning, match="repetition_penalty: not followed"):
        model.generate_until([request(0, repetition_penalty=1.1)])


def test_generate_until_multi_round__asks_until_the_task_ends(model: Any) -> None:
    def rounds(document: Any, **given: Any) -> Any:
        if not given:
            return messages({"text": "first"})
        if given["round_idx"] == 2:
            return None, True, given["previous_output"], None
        return messages({"text": f"{given['previous_output'][-1]} then second"}), False, given["previous_output"], None

    asked = SimpleNamespace(args=("context", rounds, {}, 0, "pope", "test"))
    assert model.generate_until_multi_round([asked]) == [["first", "first then second"]]

    def endless(document: Any, **more: Any) -> Any:
        return (messages(document), False, more["previous_output"], None) if more else messages(document)

    with pytest.raises(QLIPError, match="does not end"):
        model.generate_until_multi_round([SimpleNamespace(args=("context", endless, {}, 0, "pope", "test"))])


def test_loglikelihood__of_a_given_answer(model: Any) -> None:
    asked = SimpleNamespace(args=("Is it red?", lambda document: " yes", lambda document: [RED], 0, "pope", "test"))
    assert model.loglikelihood([asked]) == [(-1.5, True)]
    [conversation] = model.chat.asked[0][0]
    assert conversation.turns == (Turn("user", "<image>\nIs it red?"), Turn("assistant", "yes"))


def test_conversation_of__places_images(module: ModuleType) -> None:
    image, text = {"type": "image", "url": RED}, {"type": "text", "text": "compare <image> with <image>"}
    both = module.conversation_of([{"role": "user", "content": [image, image, text]}], "task 0")
    assert both.turns[0].text == "compare <image> with <image>" and len(both.images) == 2
    one = module.conversation_of([{"role": "user", "content": [image, text]}], "task 0")
    assert one.turns[0].text.count("<image>") == len(one.images) == 1
    plain = module.conversation_of([{"role": "user", "content": "say <image>"}], "task 0")
    assert "<image>" not in plain.turns[0].text and not plain.images
    with pytest.raises(QLIPError, match="task 0: asks about video"):
        module.conversation_of([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "task 0")


def test_class__is_a_chat_model(module: ModuleType) -> None:
    assert issubclass(module.QLIPVision, Interface) and not module.QLIPVision.is_simple
    assert not module.QLIPVision.__abstractmethods__
    with pytest.raises(QLIPError, match="batch_size 'auto'"):
        module.QLIPVision(batch_size="auto")


def test_manifest__is_the_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    for name in ("lmms_eval", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    found = lmms.manifest()
    assert (found.model_id, found.chat_class_path) == ("qlip", "qlip.vlm.lmms.model.QLIPVision")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"qlip": "qlip.vlm.lmms:manifest"}


class Table(list[dict[str, Any]]):
    """The two things that the tasks use of a table of the package datasets."""

    @classmethod
    def from_list(cls, rows: list[dict[str, Any]]) -> Table:
        return cls(rows)


def test_scenes__tables_of_questions_with_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "PER_KIND", 3)
    documents = scenes.questions(Table([{"split": "seen"}]))
    assert [one["kind"] for one in documents] == [*KINDS] * 3
    assert documents[9]["question"] == SceneQuestions("seen")[9].text
    for one in documents[:7]:
        assert scenes.results_of(one, [f" {one['answer'].capitalize()}. "]) == {"right": 1, f"right_{one['kind']}": 1}
        assert scenes.results_of(one, ["unsure"])["right"] == 0
    assert scenes.images_of(documents[2])[0].tobytes() == SceneQuestions("seen")[2].image().tobytes()
    assert documents[2]["other"] % 7 == 2 != documents[2]["other"]
    other = SceneQuestions("seen")[documents[2]["other"]]
    assert scenes.shuffled_images_of(documents[2])[0].tobytes() == other.image().tobytes()
    assert scenes.no_images_of(documents[2]) == []
    assert scenes.text_of({"question": "Q?"}, {"post_prompt": "\nShort."}) == "Q?\nShort."


def test_tasks__name_functions_that_exist_and_have_a_metric_for_each_kind() -> None:
    class Loader(yaml.SafeLoader):
        pass

    names: list[str] = []
    Loader.add_constructor("!function", lambda loader, node: names.append(node.value))  # type: ignore[type-var]
    tasks = {path.name: yaml.load(path.read_text(), Loader) for path in sorted(lmms.TASKS.glob("*.yaml"))}
    for name in names:
        where, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(where), function)), name
    metrics = [one["metric"] for one in tasks["_scenes.yaml"]["metric_list"]]
    assert metrics == ["right", *(f"right_{kind}" for kind in KINDS)]
    listed = tasks["qlip_scenes.yaml"]["task"]
    assert sorted(f"{name}.yaml" for name in listed) == sorted(tasks.keys() - {"_scenes.yaml", "qlip_scenes.yaml"})
    for name, task in tasks.items():
        for file in task.get("dataset_kwargs", {}).get("data_files", {}).values():
            assert (lmms.TASKS / file).is_file(), name
