"""A UM3 measured in both directions: prompts as in training, controls, resumption, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlip import QLIPModel
from qlip.cli.main import run as qlip
from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scene_questions import SceneQuestions
from qlip.data.public.scenes import draw
from qlip.errors import QLIPError
from qlip.evaluation.prompt_suites import scenes
from qlip.evaluation.report.result import Result
from qlip.evaluation.run.scene_captions import ONE_OBJECT
from qlip.lm.causal import CausalModel
from qlip.lm.vocabulary import train_tokenizer
from qlip.um3 import UM3, UM3Config, evaluate
from qlip.um3.data.documents import DocumentBuilder
from qlip.um3.evaluate import DrawSettings, answer_of, draw_scenes, drawing_of, measure_text, read_documents
from qlip.um3.session import UM3Chat
from qlip.um3.text_eval import measure_texts
from tests.um3.tiny import text_config

Captured = pytest.CaptureFixture[str]
SCENE = CaptionedScenes("seen").scene(0)
CAPTION, IMAGE = SCENE[0].caption, draw(SCENE[1])


@pytest.fixture(scope="session")
def um3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the bundled QLIP's tokens, and the text decoder that it grew from in ``text``."""
    folder = tmp_path_factory.mktemp("um3")
    texts = [SceneQuestions("train")[at].text for at in range(30)] + [CAPTION]
    tokenizer, tower = train_tokenizer(texts, 300, ("<boi>", "<eoi>")), QLIPModel.from_pretrained("bundled")
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.size, "max_position_embeddings": 400, "eos_token_id": tokenizer.eos}
    text = CausalModel(text_config(**sizes))
    for one in text.parameters():
        if one.ndim > 1:
            torch.nn.init.normal_(one, std=0.3)
    text.save_pretrained(folder / "text")
    config = UM3Config.extend(
        text.config,
        begin_image=tokenizer.token("<boi>"),
        end_image=tokenizer.token("<eoi>"),
        group_size=tower.group_size,
        num_groups=tower.num_bits // tower.group_size,
        grid=tower.grid,
        vision_fingerprint=tower.code_fingerprint,
    )
    UM3.grown(text, config, "random").save_pretrained(folder / "um3")
    for name in ("text", "um3"):
        tokenizer.save(folder / name)
    return folder


@pytest.fixture(scope="session")
def chat(um3_folder: Path) -> UM3Chat:
    return UM3Chat.from_pretrained(um3_folder / "um3", device="cpu")


def test_answer_of__prompts_are_documents_of_training_up_to_the_answer(
    chat: UM3Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    builder, question = DocumentBuilder(chat.model.config, chat.tokenizer), "What colour is the circle?"

    def generate(prompts: list[object], **options: object) -> list[list[str]]:
        assert options["generation_mode"] == "text" and options["sampling"] == evaluate.GREEDY
        asked.extend(chat.encode(one) for one in prompts)  # type: ignore[arg-type]
        return [[" red "] for _ in prompts]

    monkeypatch.setattr(chat, "generate", generate)
    answer = answer_of(chat)
    assert list(answer([IMAGE, IMAGE], [question, ""])) == ["red", "red"]
    assert list(answer(None, [question, ""])) == ["red", "red"]
    for prompt, text, said in ((asked[0], question, " red"), (asked[1], "", CAPTION)):
        ids = builder.text_ids("image-to-text", text + said)
        document = builder.pair("image-to-text", ids, chat.tokens(IMAGE)).tolist()
        assert document[: len(prompt)] == prompt and len(prompt) < len(document)
    assert asked[2] == builder.texts([question])[0][:-1]  # blind: no image
    assert len(asked[3]) == chat.model.config.image_length + 2  # a grey one


def test_drawing_of__blind_is_without_the_caption(chat: UM3Chat) -> None:
    settings = DrawSettings(seed=3)
    listening, blind = drawing_of(chat, settings), drawing_of(chat, settings, blind=True)
    one, other = listening([CAPTION, "a blue square"], [0, 1])
    assert one.size == (64, 64) and one.tobytes() != other.tobytes()
    assert listening([CAPTION], [0])[0].tobytes() == one.tobytes()
    assert [image.tobytes() for image in blind([CAPTION, "a blue square"], [0, 0])] == 2 * [
        blind(["anything"], [0])[0].tobytes()
    ]


def test_draw_scenes__true_drawings_are_right_and_blind_ones_seldom(
    chat: UM3Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = [draw(CaptionedScenes("seen").scene(at)[1]) for at in range(12)]

    def drawing(chat: UM3Chat, settings: DrawSettings, blind: bool = False) -> object:
        return lambda captions, numbers: [true[0 if blind else number] for number in numbers]

    monkeypatch.setattr(evaluate, "drawing_of", drawing)
    found = draw_scenes(chat, scenes("seen", 12), tmp_path, DrawSettings(), {})
    values = found.values
    assert values["scenes_right"].value == 100 and values["scenes_right_one_object"].value == 100
    assert values["scenes_blind"].value == pytest.approx(100 / 12) and "scenes_rebuilt" in values
    single = sum(one["family"] in ONE_OBJECT for one in found.tables["images"])
    assert values["scenes_blind_one_object"].count == values["scenes_right_one_object"].count == single
    assert [bool(one["blind"]) for one in found.tables["images"]] == [True, *[False] * 11]
    assert found.notes["scenes_blind"].startswith("control")


def test_measure_text__against_the_text_decoder_before(chat: UM3Chat, um3_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("Is there a circle?", "The square.")))
    before = CausalModel.from_pretrained(um3_folder / "text")
    row, found = measure_text(chat, "own", read_documents(str(path)), (before, chat.tokenizer))
    assert row.count == 2 and row.title == "text, own"
    # the text rows are the text decoder's, so the text costs the same
    assert found.values["bits_per_byte_more"].value == pytest.approx(0, abs=1e-5)
    own = measure_texts(before, chat.tokenizer, ["Is there a circle?", "The square."])
    assert found.values["bits_per_byte"].value == pytest.approx(own.bits_per_byte, abs=1e-5)
    path.write_text("no JSON\n")
    with pytest.raises(QLIPError, match="line 1: not JSON; leave it out"):
        read_documents(str(path))


def test_um3_eval__tables_result_and_continuation(um3_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Is there a red circle?")
    command = ["um3", "eval", str(um3_folder / "um3"), "-o", str(out), "--per-kind", "2", "--scenes", "2"]
    command += ["--split", "seen", "--text", str(text), "--before", str(um3_folder / "text"), "--device", "cpu"]
    assert qlip(command) == 0
    said = capsys.readouterr().out
    assert "captions of made scenes, seen" in said and "right less shuffled" in said
    assert "shuffled" in said and "blind" in said and "other caption" in said
    assert "bits_per_byte_before" in said and str(out / "drawn") in said
    result = Result.load(out / "result.json")
    assert result.subject["kind"] == "UM3"
    names = ["scene_captions", "scene_questions", "drawn_scenes", "text"]
    assert [one.evaluator for one in result.measured] == names
    for one, controls in zip(
        result.measured, (("captions_shuffled", "captions_blind"), ("shuffled", "blind")), strict=False
    ):
        assert set(controls) <= one.values.keys()
    assert {"scenes_blind", "scenes_other_caption"} <= result.measured[2].values.keys()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if "drawn" in path.parts}
    assert len(kept) == 4
    assert qlip([*command, "--json"]) == 0
    again = Result.model_validate(json.loads(capsys.readouterr().out))
    assert [one.values for one in again.measured] == [one.values for one in result.measured]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert qlip(["compare", str(out)]) == 0
    capsys.readouterr()
    assert qlip(["eval", "--verify", str(out)]) == 2
    assert "measure them again with qlip um3 eval" in capsys.readouterr().err
    assert qlip([*command, "--per-kind", "3"]) == 1
    assert "holds another measurement (per_kind differ)" in capsys.readouterr().err
