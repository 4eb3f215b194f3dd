"""Drafters made here: recorded is what the target computes; what learns from it guesses, and changes no text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import specexec
from cli.app import commands
from offload.checkpoint.headers import open_folder
from offload.hub.names import demo_folder
from offload.machine.atomic_write import replace_with
from offload.machine.memory import Ram
from specexec.compose.context import encoding_in
from specexec.compose.head_folders import head_kind, verifier_of
from specexec.compose.small_model import opened
from specexec.distill import record as recording_of_answers
from specexec.distill.batches import TextBatch, Texts
from specexec.distill.divergence import LOSSES, Labels, Loss, divergence
from specexec.distill.eagle3 import Eagle3Student
from specexec.distill.heads import HeadTraining
from specexec.distill.layers import SharedWithTarget
from specexec.distill.record import left_to_record, record, target_of, tokens_named, usual_taps
from specexec.distill.recording import RecordedTarget, Recording
from specexec.distill.small_model import SmallModel
from specexec.distill.training import TrainingPlan, held_out, train
from specexec.drafters.heads.eagle import EagleHead
from specexec.drafters.heads.eagle_fields import EagleFields
from specexec.drafters.heads.refusal import TargetShape
from specexec.engine.decoder import Decoder
from specexec.engine.engine import Engine
from specexec.engine.request_types import Request
from specexec.errors import BadCheckpoint, BadDrafter, BadRecording
from specexec.model.cache import KVCache
from specexec.model.tree_lm import Rows
from specexec.planning.best_first import BestFirst
from specexec.sampling.params import SamplingParams
from tests.distilled import CPU, TAPS, Taught
from tests.eagle_models import VOCABULARY
from tests.gguf_files import write_gguf
from tests.tiny import tiny
from tests.writing import prompt, sequence_of, texts_are_plain

REFERENCES = Path(__file__).parent / "data" / "heads"
STEPS = 3


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    found = Taught(tmp_path_factory.mktemp("taught"), "eagle3")
    yield found
    found.target.close()


@pytest.mark.parametrize("name", ["eagle3", "eagle3_redhat", "eagle3_gptoss"])
def test_a_head_in_training_computes_what_its_package_does_in_all_steps(name: str) -> None:
    settings = json.loads((REFERENCES / name / "config.json").read_text(encoding="utf-8"))
    tensors, wanted = (load_file(REFERENCES / name / f"{kind}.safetensors") for kind in ("model", "reference"))
    tensors = {key: one.float() if one.is_floating_point() else one for key, one in tensors.items()}
    shapes = {key: tuple(one.shape) for key, one in tensors.items()}
    fields = EagleFields.of(settings, shapes, TargetShape(8, 32, 96), name)
    config = LlamaConfig.from_dict(dict(fields.layer))
    head = EagleHead(fields, AutoModelForCausalLM.from_config(config), frozenset(tensors), len(tensors["fc.weight"][0]))
    head.load_state_dict({key: tensors[key] for key in head.state_dict()})
    text, rows = wanted["text"], len(wanted["states"])
    place_V = torch.full((96,), -1)
    place_V[tensors["t2d"].nonzero().flatten()] = torch.arange(40)
    shared = SharedWithTarget(tensors["embed_tokens.weight"], tensors["lm_head.weight"], place_V, None)
    student = Eagle3Student(head, LlamaRotaryEmbedding(config), shared, STEPS)
    states_RF = torch.cat([wanted["states"], torch.zeros(1, 96)])
    answer_R = torch.ones(rows + 1, dtype=torch.bool)
    top = torch.zeros(1, rows + 1, 4)
    batch = TextBatch(text[None], answer_R[None], states_RF[None], top.long(), top, states_RF[None])
    for step, (logits_KD, _, at) in enumerate(student.unrolled(batch)):
        assert at.rows_BR[0].nonzero().flatten().tolist() == list(range(rows - 1 - step))
        assert (logits_KD - wanted[f"logits_{step}"][: rows - 1 - step]).abs().max() < 1e-5
    assert step == STEPS - 1


def test_a_reading_is_what_the_model_itself_computes(taught: Taught) -> None:
    """transformers' own forward, by its own names of hidden states."""
    read = taught.recording.read(3)
    with torch.no_grad():
        output = chain_target_again(taught)(read.tokens_R[None], output_hidden_states=True)
    log_probs_RV = output.logits[0].log_softmax(-1)
    for at, tap in enumerate(TAPS):
        assert (read.states_RTH[:, at].float() - output.hidden_states[tap][0]).abs().max() < 2e-2  # bfloat16
    best = log_probs_RV.topk(8, -1)
    assert (best.values - read.top_log_probs_RN.float()).abs().max() < 2e-2
    assert (best.indices[:, 0] == read.top_ids_RN[:, 0]).all()


def chain_target_again(taught: Taught) -> torch.nn.Module:
    found: torch.nn.Module = AutoModelForCausalLM.from_pretrained(taught.recording.folder.parent / "target").eval()
    return found


def test_a_head_learns_what_the_target_does(taught: Taught) -> None:
    looks = [one.accepted for one in taught.course if one.accepted is not None]
    assert looks[0] < 0.2  # of three guesses; by chance alone 1 in 96
    assert looks[-1] > 1.5
    assert taught.course[-1].loss < taught.course[1].loss / 2


def test_its_folder_is_what_the_package_writes_and_our_loader_reads(taught: Taught) -> None:
    folder = open_folder(taught.folder)
    assert (head_kind(folder), verifier_of(folder)) == ("EAGLE-3", "a/chain")
    ours = json.loads((taught.folder / "config.json").read_text(encoding="utf-8"))
    theirs = json.loads((REFERENCES / "eagle3_gptoss" / "config.json").read_text(encoding="utf-8"))
    assert theirs.keys() - ours.keys() == {"auto_map", "transformers_version"}
    assert ours["speculators_config"].keys() == theirs["speculators_config"].keys()
    names = load_file(REFERENCES / "eagle3_gptoss" / "model.safetensors")
    own = load_file(taught.folder / "model.safetensors")
    assert own.keys() == names.keys() - {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    assert {key: one.dtype for key, one in own.items()} == {key: names[key].dtype for key in own}
    assert len(own["d2t"]) == 64


def test_what_drafts_computes_what_was_trained(taught: Taught) -> None:
    (piece,) = taught.texts.held_out[:1]
    batch = taught.texts.batch([piece])
    text, states_RF = batch.tokens_BR[0].tolist(), batch.states_BRF[0, :-1].float()
    part = Rows(KVCache(), text[1:], range(-1, len(text) - 2), features_RF=taught.head.head.joined(states_RF))
    (hidden_RH,) = taught.head.lm.forward([part])
    assert isinstance(taught.student, Eagle3Student)
    with torch.no_grad():
        logits_KD, _, at = next(iter(taught.student.unrolled(batch)))
    found_KD = taught.head.lm.head(hidden_RH)[at.rows_BR[0]]
    assert (found_KD - logits_KD).abs().max() < 0.05 * logits_KD.abs().max()  # weights were rounded to bfloat16


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_head_that_was_trained_here_changes_no_text(temperature: float, taught: Taught) -> None:
    how = SamplingParams(temperature=temperature, seed=3, max_tokens=12)
    prompts = [prompt(length, length, VOCABULARY) for length in (9, 5)]
    texts_are_plain(taught.target, taught.head.drafter(taught.target, VOCABULARY), prompts, how, VOCABULARY)


def test_a_head_that_was_trained_here_saves_sweeps(taught: Taught) -> None:
    decoder = Decoder(taught.target, taught.head.drafter(taught.target, VOCABULARY), BestFirst(), 8)
    decoder.join(
        sequence_of(prompt(9, 9, VOCABULARY), SamplingParams(temperature=0.0, max_tokens=24), vocabulary=VOCABULARY)
    )
    sweeps = 0
    while decoder.live:
        decoder.step()
        sweeps += 1
    assert sweeps < 18


def test_a_training_that_was_stopped_gives_the_same_head(taught: Taught, tmp_path: Path) -> None:
    plan = TrainingPlan(epochs=1, rows=256, rate=1e-2)
    training = HeadTraining(taught.recording, taught.texts, plan, 64)
    whole, parts = training.student(), training.student()
    list(train(whole, taught.texts, plan, tmp_path, CPU, half=False))
    (tmp_path / "training.safetensors").unlink()
    begun = train(parts, taught.texts, plan, tmp_path, CPU, half=False)
    for _ in range(4):
        next(begun)
    begun.close()
    parts = training.student()
    rest = [one.step for one in train(parts, taught.texts, plan, tmp_path, CPU, half=False)]
    assert rest[0] == 4
    for name, one in whole.trained.items():
        assert torch.equal(one, parts.trained[name]), name
    with pytest.raises(BadCheckpoint, match="begun with other rate"):
        next(train(parts, taught.texts, TrainingPlan(1, 256, 2e-2), tmp_path, CPU, half=False))
    other = replace(training, loss="tv").student()
    with pytest.raises(BadCheckpoint, match="begun with other loss"):
        next(train(other, taught.texts, plan, tmp_path, CPU, half=False))
    target = replace(taught.recording.target, tokens="another tokenizer's")
    elsewhere = replace(taught.texts, recording=replace(taught.recording, target=target))
    with pytest.raises(BadCheckpoint, match="begun with other target"):
        next(train(parts, elsewhere, plan, tmp_path, CPU, half=False))
    path = taught.recording.folder / f"hs_{taught.texts.taught[0].text}.safetensors"
    before = path.read_bytes()
    tensors = load_file(path)
    tensors["token_ids"][0] += 1
    save_file(tensors, path)
    with pytest.raises(BadCheckpoint, match="begun with other texts"):
        next(train(parts, taught.texts, plan, tmp_path, CPU, half=False))
    path.write_bytes(before)
    save_file({"weights/out": torch.zeros(1)}, tmp_path / "training.safetensors")
    with pytest.raises(BadCheckpoint, match="begun with other epochs"):
        next(train(parts, taught.texts, plan, tmp_path, CPU, half=False))
    (tmp_path / "training.safetensors").write_bytes(b"half of it")
    with pytest.raises(BadCheckpoint, match="is damaged"):
        next(train(parts, taught.texts, plan, tmp_path, CPU, half=False))


def test_a_divergence_over_all_tokens_is_the_closed_form() -> None:
    drawn = torch.Generator().manual_seed(0)
    logits_RS = torch.randn(5, 7, generator=drawn, dtype=torch.float32)
    p_RS, q_RS = torch.randn(5, 7, generator=drawn).softmax(-1), logits_RS.softmax(-1)
    middle_RS = (p_RS + q_RS) / 2
    wanted = {
        "forward-kl": (p_RS * (p_RS / q_RS).log()).sum(-1),
        "reverse-kl": (q_RS * (q_RS / p_RS).log()).sum(-1),
        "jsd": ((p_RS * (p_RS / middle_RS).log()).sum(-1) + (q_RS * (q_RS / middle_RS).log()).sum(-1)) / 2,
        "tv": 1 - torch.minimum(p_RS, q_RS).sum(-1),
    }
    labels = labels_of(p_RS)
    for kind, value_R in wanted.items():
        assert (divergence(logits_RS, labels, kind) - value_R).abs().max() < 1e-5, kind  # type: ignore[arg-type]
        assert divergence(p_RS.log(), labels, kind).abs().max() < 1e-5, kind  # type: ignore[arg-type]


def test_the_gradient_of_tv_plus_plus_is_that_of_tv_centred_and_scaled() -> None:
    """- E_q [(r - mean) / std * grad log q], r = 1[p > q], written down for one row."""
    drawn = torch.Generator().manual_seed(1)
    logits_RS = torch.randn(1, 6, generator=drawn, requires_grad=True)
    p_RS = torch.randn(1, 6, generator=drawn).softmax(-1)
    divergence(logits_RS, labels_of(p_RS), "tv++").sum().backward()
    q_S, p_S = logits_RS.detach().softmax(-1)[0], p_RS[0]
    reward_S = (p_S > q_S).float()
    mean = (q_S * reward_S).sum()
    scaled_S = (reward_S - mean) / (q_S * (reward_S - mean) ** 2).sum().sqrt()
    wanted_S = -(q_S * scaled_S) + q_S * (q_S * scaled_S).sum()
    assert logits_RS.grad is not None
    assert (logits_RS.grad[0] - wanted_S).abs().max() < 1e-5


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_leads_to_the_target(kind: Loss) -> None:
    drawn = torch.Generator().manual_seed(2)
    p_RS = (2 * torch.randn(4, 9, generator=drawn)).softmax(-1)
    labels = Labels(*reversed(p_RS.topk(5, -1)))
    logits_RS = torch.zeros(4, 9, requires_grad=True)
    far = divergence(logits_RS, labels, "tv").mean().detach()
    optimiser = torch.optim.Adam([logits_RS], lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        divergence(logits_RS, labels, kind).mean().backward()
        optimiser.step()
    assert divergence(logits_RS, labels, "tv").mean().detach() < far / 4


def test_what_a_student_cannot_name_is_left_out_of_what_it_is_asked() -> None:
    place_V = torch.tensor([0, -1, 1, 2])
    labels = Labels.of(torch.tensor([[1, 0, 3]]), torch.tensor([[0.5, 0.25, 0.125]]).log(), place_V)
    assert labels.ids_RN.tolist() == [[0, 0, 2]]
    assert torch.allclose(labels.probabilities_RN, torch.tensor([[0.0, 0.5, 0.25]]))


def labels_of(p_RS: Tensor) -> Labels:
    return Labels(torch.arange(p_RS.shape[-1]).expand(p_RS.shape), p_RS)


# A real engine: the demo


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with specexec.load("demo") as engine:
        yield engine


def asked(prompts: list[str]) -> list[Request]:
    how = SamplingParams(temperature=0.0, max_tokens=12)
    return [Request(index, [{"role": "user", "content": one}], how) for index, one in enumerate(prompts)]


def begun(demo: Engine, folder: Path) -> Recording:
    target = target_of(demo, "demo")
    found = Recording(folder, target, usual_taps(target.layers), 16, {"temperature": 0.0}, replace_with)
    found.begin(demo.shared_tensors())
    return found


QUESTIONS = ["What is a tree?", "What is a drafter?", "How does specexec work?"]


def test_a_recording_that_was_stopped_goes_on_where_it_was(
    demo: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_of_answers, "TOGETHER", 1)
    recording, requests = begun(demo, tmp_path / "stopped"), asked(QUESTIONS)
    running = record(demo, requests[:2], recording)
    assert any(one.texts for one in running)
    running.close()
    there = recording.texts
    assert there
    left = left_to_record(recording, requests)
    assert [one.index for one in left] == [index for index in range(3) if index not in there]
    list(record(demo, left, recording))
    whole = begun(demo, tmp_path / "whole")
    monkeypatch.undo()
    reports = list(record(demo, requests, whole))
    assert max(one.growing for one in reports) > 0, "written, and kept later"
    for number, question in enumerate(asked(QUESTIONS)):
        one, other = recording.read(number), whole.read(number)
        answer = demo.generate(question.prompt, question.sampling)
        assert one.tokens_R[one.answer_R].tolist() == other.tokens_R[other.answer_R].tolist() == [*answer.tokens]
        assert int((~one.answer_R).sum()) == answer.prompt_tokens
        assert torch.allclose(one.states_RTH.float(), other.states_RTH.float(), atol=0.1, rtol=0.1)
    with pytest.raises(BadRecording, match="answers another prompt"):
        left_to_record(recording, asked(QUESTIONS[::-1]))
    with pytest.raises(BadRecording, match="another top"):
        Recording(recording.folder, recording.target, recording.taps, 4, recording.sampling, replace_with).begin({})


def test_damaged_recordings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadRecording, match="holds no recording"):
        Recording.open(tmp_path, replace_with)
    (tmp_path / "recording.json").write_text('{"version": 1}', encoding="utf-8")
    with pytest.raises(BadRecording, match="cannot be read"):
        Recording.open(tmp_path, replace_with)
    target = RecordedTarget("a", "b", 8, 4, 16, 32, "c")
    recording = Recording(tmp_path, target, (0,), 4, {}, replace_with)
    (tmp_path / "hs_0.safetensors").write_bytes(b"torn")
    with pytest.raises(BadRecording, match="is damaged"):
        recording.read(0)
    with pytest.raises(BadRecording, match="holds 1 texts"):
        Texts.of(recording, 8)


def test_a_recording_with_other_settings_is_refused_by_those_that_differ(tmp_path: Path) -> None:
    target = RecordedTarget("a", "b", 8, 4, 16, 32, "c")
    recording = Recording(tmp_path, target, (0,), 4, {"seed": 1, "max_tokens": 8, "top_k": 0}, replace_with)
    recording.begin({})
    recording.begin({})
    other = replace(recording, sampling={"seed": 1, "max_tokens": 9, "top_k": 0})
    with pytest.raises(BadRecording, match=r"another sampling: \{'max_tokens': 8\}, now \{'max_tokens': 9\}\."):
        other.begin({})
    with pytest.raises(BadRecording, match=r"another taps: \[0\], now \[1\]\."):
        replace(recording, taps=(1,)).begin({})


def test_a_small_model_learns_from_a_recording(taught: Taught) -> None:
    """It is a copy of the target that has been disturbed, and comes nearer."""
    model = AutoModelForCausalLM.from_pretrained(taught.recording.folder.parent / "target")
    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.05 * torch.randn(one.shape, generator=drawn))
    small = SmallModel.of(model, taught.recording.target, "jsd")
    plan = TrainingPlan(epochs=3, rows=256, rate=3e-3)
    before = held_out(small, taught.texts, 512, CPU, half=False)
    *_, last = train(small, taught.texts, plan, taught.folder.parent / "small", CPU, half=False)
    assert last.accepted is not None
    assert last.accepted > before + 0.3


def test_a_small_model_that_cannot_be_trained_is_refused_by_name_and_runs_nothing(tmp_path: Path) -> None:
    """Code of its own is not run and not asked about; weights in a GGUF file have no folder to be written like."""
    small, target = tmp_path / "small", RecordedTarget("a", "b", 8, 4, 16, 32, "c")
    shutil.copytree(demo_folder("drafter"), small)
    own = tokens_named(encoding_in(small).tokenizer.get_vocab())
    settings = json.loads((small / "config.json").read_text(encoding="utf-8"))
    code = {"model_type": "strange", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (small / "config.json").write_text(json.dumps(settings | code))
    (small / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadDrafter, match=r"brings code of its own \(own\.py\)"):
        opened(small, replace(target, tokens=own), "jsd")
    assert not (tmp_path / "ran").exists()
    file = tmp_path / "small.gguf"
    write_gguf(tiny("llama", tmp_path / "dense"), file)
    with pytest.raises(BadDrafter, match="training needs a folder of transformers"):
        opened(open_folder(file).path, target, "jsd")


def test_the_commands_make_drafters_that_the_others_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS) + "\n")
    kept, head, block, layer, small = (str(tmp_path / name) for name in ("recorded", "head", "block", "mtp", "small"))
    recording = ["distill", "record", "--prompts", str(tmp_path / "prompts.txt"), "-o", kept, "-n", "12", "-t", "0"]
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("cli.distill.record.shutil.disk_usage", lambda _: free._replace(free=1000))
    refused = CliRunner().invoke(commands, recording)
    assert "may come to take" in str(refused.exception)
    assert not Recording.open(Path(kept), replace_with).texts
    monkeypatch.undo()
    for line in (
        recording,
        ["distill", "head", kept, "-o", head, "--epochs", "1", "--draft-vocab", "1k"],
        ["distill", "head", kept, "--kind", "dflash", "--epochs", "1", "--draft-vocab", "1k", "-o", block],
        ["distill", "head", kept, "--kind", "mtp", "--epochs", "1", "-o", layer],
        ["distill", "model", kept, "--from", str(demo_folder("drafter")), "-o", small, "--epochs", "1"],
    ):
        output = Path(line[line.index("-o") + 1])
        with FileLock(output.with_name(f".{output.name}.lock")):
            beside = CliRunner().invoke(commands, line)
        assert "another specexec is writing into" in str(beside.exception)
        run = CliRunner().invoke(commands, line)
        assert (run.exit_code, run.exception) == (0, None), run.output
        assert not (Path(line[line.index("-o") + 1]) / "training.safetensors").exists()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_gpu = CliRunner().invoke(commands, ["distill", "head", kept, "-o", str(tmp_path / "other"), "--device", "cuda"])
    assert "--device cuda was asked for" in str(on_gpu.exception)
    other = ["distill", "head", kept, "-o", str(tmp_path / "other")]
    monkeypatch.setattr("cli.distill.room.free_ram", lambda: Ram(0, ""))
    assert "training takes about" in str(CliRunner().invoke(commands, other).exception)
    monkeypatch.undo()
    monkeypatch.setattr("cli.distill.room.shutil.disk_usage", lambda _: free._replace(free=1000))
    assert "and 1.0 kB are free" in str(CliRunner().invoke(commands, other).exception)
    monkeypatch.undo()
    again = CliRunner().invoke(commands, ["distill", "head", kept, "-o", head])
    assert "is there already" in str(again.exception)
    ask = ["chat", "--json", "-p", QUESTIONS[0], "-n", "12", "-t", "0", "-d"]
    drafters = ("none", head, block, layer, small)
    plain, *drafted = (json.loads(CliRunner().invoke(commands, [*ask, one]).stdout) for one in drafters)
    assert [one["text"] for one in drafted] == [plain["text"]] * 4
    assert all(one["engine"]["drafter"] != "none" for one in drafted)


def test_the_names_of_tokens_are_those_of_what_they_mean() -> None:
    assert tokens_named({"a": 0, "b": 1}) == tokens_named({"b": 1, "a": 0}) != tokens_named({"a": 1, "b": 0})


def test_rows_without_a_question_change_no_guess(taught: Taught) -> None:
    """Of a prompt the MLP is left out in training; what is asked behind it is as if everything were asked."""
    batch = taught.texts.batch(taught.texts.held_out[:2])
    asked_BR = torch.zeros_like(batch.answer_BR)
    asked_BR[:, 15:] = True
    student = taught.student
    assert isinstance(student, Eagle3Student)
    with torch.no_grad():
        all_steps, some_steps = (
            list(student.unrolled(replace(batch, answer_BR=one))) for one in (torch.ones_like(asked_BR), asked_BR)
        )
    for step, (whole, part) in enumerate(zip(all_steps, some_steps, strict=True)):
        rows_BR = part.asked.rows_BR
        assert rows_BR.sum() < whole.asked.rows_BR.sum(), step
        assert (whole.logits_KD[rows_BR[whole.asked.rows_BR]] - part.logits_KD).abs().max() < 1e-5, step
