"""ELMo against its definition in NumPy and against the published fixture; tokens; saving; padding."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import published
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoTokenizer

from hf_msif import InputError
from hf_msif.models import ElmoConfig, ElmoForBidirectionalLM, ElmoForSequenceClassification, ElmoModel, ElmoTokenizer
from hf_msif.models.elmo import convert, layers, vocabulary

SENTENCES = ["we won the debate", "no", "they said the wall will win , sadly", "naïve 🙂 " + "x" * 60, "the the the"]
FIXTURE = os.environ.get("HF_MSIF_ELMO_FIXTURE")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("elmo"))


def small(**settings):
    sizes = {"filters": published.FILTERS, "character_size": 4, "cell_size": 12, "projection_size": 5}
    return ElmoConfig(**{"vocab_size": 17, "num_highway_layers": 1, **sizes, **settings})


def batch(sentences, **settings):
    return ElmoTokenizer(**settings)(sentences, padding=True, return_tensors="pt")


def run(model, sentences, **settings):
    tokens = batch(sentences)
    with torch.no_grad():
        return model(tokens["input_ids"], tokens["attention_mask"], **settings), tokens


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_imported_model_is_what_the_files_say(tmp_path, skip, activation):
    paths = published.write(tmp_path, skip=skip, activation=activation)
    oracle = published.Oracle(*paths[:2])
    model = ElmoModel.from_allennlp(*paths[:2]).double()
    out, tokens = run(model, SENTENCES, output_hidden_states=True)
    for i, sentence in enumerate(SENTENCES):
        length = int(tokens["attention_mask"][i].sum())
        expected = torch.from_numpy(oracle.layers(sentence))
        found = torch.stack([layer[i, :length] for layer in out.hidden_states])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(out.last_hidden_state[i, :length], expected[-1], rtol=0, atol=1e-12)
    padding = tokens["attention_mask"] == 0
    assert padding.any()
    assert not out.last_hidden_state[padding].any()
    at_the_limit = float((out.hidden_states[1].abs() == 0.5).double().mean())
    assert 0 < at_the_limit < 0.9  # the clips are at work


def test_carried_state_goes_on_row_by_row(files):
    oracle, model = published.Oracle(*files[:2]), ElmoModel.from_allennlp(*files[:2], stateful=True).double()
    states = [{} for _ in range(3)]
    for sentences in (SENTENCES[:3], SENTENCES[1:4], SENTENCES[:1], SENTENCES[2:5]):
        out, _ = run(model, sentences)
        for i, sentence in enumerate(sentences):
            expected = torch.from_numpy(oracle.layers(sentence, states[i])[-1])
            torch.testing.assert_close(out.last_hidden_state[i, : len(expected)], expected, rtol=0, atol=1e-12)
    model.reset_states()
    out, _ = run(model, SENTENCES[:1])
    expected = torch.from_numpy(oracle.layers(SENTENCES[0])[-1])
    torch.testing.assert_close(out.last_hidden_state[0], expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(FIXTURE is None, reason="HF_MSIF_ELMO_FIXTURE does not name the folder of AllenNLP's test fixture")
@pytest.mark.parametrize("batched", [True, False])
def test_published_fixture(batched):
    folder = Path(FIXTURE)
    lists = json.loads((folder / "sentences.json").read_text())
    kinds = [ElmoModel.from_allennlp(folder / "options.json", folder / "lm_weights.hdf5", stateful=True)]
    worst = 0.0
    for rows in [range(3)] if batched else [[0], [1], [2]]:
        kinds[0].reset_states()
        for number in range(len(lists[0])):
            out, tokens = run(kinds[0], [lists[k][number] for k in rows])
            for i, k in enumerate(rows):
                with h5py.File(folder / f"lm_embeddings_{k}.hdf5") as file:
                    expected = np.concatenate(list(file[str(number)]), axis=1)
                found = out.last_hidden_state[i, 1 : int(tokens["attention_mask"][i].sum()) - 1].numpy()
                assert found.shape == expected.shape
                worst = max(worst, float(np.abs(found - expected).max()))
    words = (folder / "vocab_test.txt").read_text().splitlines()
    ids = torch.tensor([ElmoTokenizer().characters(word) for word in words])
    with torch.no_grad(), h5py.File(folder / "elmo_token_embeddings.hdf5") as file:
        worst_word = float(np.abs(kinds[0].characters(ids).numpy() - file["embedding"][:]).max())
    print(f"largest error: {worst:.1e}, of a token embedding {worst_word:.1e}")
    assert worst < 1e-5
    assert worst_word < 1e-5


def test_losses_of_both_directions(files):
    oracle = published.Oracle(*files)
    model = ElmoForBidirectionalLM.from_allennlp(*files[:2], softmax_file=files[2]).double()
    tokens = batch(SENTENCES)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, published.VOCABULARY, tokens["attention_mask"].shape, generator=generator)
    expected = [
        oracle.loss(sentence, labels[i, : int(tokens["attention_mask"][i].sum())].tolist())
        for i, sentence in enumerate(SENTENCES)
    ]
    rows = tokens["attention_mask"][:, 1:].nonzero()[:, 0]
    for keep in (None, False):
        out = model(**tokens, labels=labels, output_logits=keep)
        assert (out.logits is None) is (keep is False)
        sums = torch.zeros(len(SENTENCES)).double().index_add(0, rows, out.losses.sum(0))
        torch.testing.assert_close(sums.tolist(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss.item(), sum(expected) / out.losses.numel(), rtol=1e-12, atol=0)


def test_losses_in_chunks_are_those_at_once(files, monkeypatch):
    model = ElmoForBidirectionalLM.from_allennlp(*files[:2], softmax_file=files[2]).double()
    tokens = batch(SENTENCES)
    labels = torch.ones_like(tokens["attention_mask"])
    whole = model(**tokens, labels=labels, output_logits=False).losses
    monkeypatch.setattr(layers, "CHUNK", 5 * published.VOCABULARY)
    torch.testing.assert_close(model(**tokens, labels=labels, output_logits=False).losses, whole, rtol=0, atol=1e-13)


def test_sampled_softmax_estimates_the_exact_one():
    torch.manual_seed(0)
    model = ElmoForBidirectionalLM(small(sampled_softmax=200_000, vocab_size=40)).double()
    tokens = batch(SENTENCES[:2])
    labels = torch.tensor([[1, 3, 39, 8, 20, 0]] * 2)
    exact = model.eval()(**tokens, labels=labels).losses
    found = model.train()(**tokens, labels=labels)
    assert found.logits is None
    torch.testing.assert_close(found.losses, exact, rtol=0, atol=0.02)
    model.config.sampled_softmax = 3
    assert (model(**tokens, labels=labels).losses - exact).abs().max() > 0.02


def test_an_encoder_alone_and_its_neighbours_do_not_matter():
    """Padding, order and company of a sentence change nothing beyond rounding."""
    torch.manual_seed(0)
    model = ElmoModel(small()).double().eval()
    together, tokens = run(model, SENTENCES)
    turned, _ = run(model, SENTENCES[::-1])
    for i, sentence in enumerate(SENTENCES):
        length = int(tokens["attention_mask"][i].sum())
        alone = run(model, [sentence])[0].last_hidden_state[0]
        for found in (together.last_hidden_state[i], turned.last_hidden_state[-1 - i]):
            torch.testing.assert_close(found[:length], alone, rtol=0, atol=1e-14)
    wide = torch.nn.functional.pad(tokens["input_ids"], (0, 0, 0, 7))
    without_mask = model(wide).last_hidden_state
    torch.testing.assert_close(without_mask[:, :-7], together.last_hidden_state, rtol=0, atol=1e-14)
    assert not without_mask[:, -7:].any()


def test_scalar_mix():
    torch.manual_seed(0)
    model = ElmoModel(small(), add_scalar_mix=True).double().eval()
    with torch.no_grad():
        model.scalar_mix.scores.copy_(torch.tensor([0.1, -2.0, 0.7], dtype=torch.float64))
        model.scalar_mix.gamma.fill_(1.5)
    out, _ = run(model, SENTENCES, output_hidden_states=True)
    weights = np.exp([0.1, -2.0, 0.7]) / np.exp([0.1, -2.0, 0.7]).sum()
    expected = 1.5 * sum(float(w) * h for w, h in zip(weights, out.hidden_states, strict=True))
    torch.testing.assert_close(out.last_hidden_state, expected, rtol=0, atol=1e-14)


def test_classifier_reads_the_mean_of_the_words():
    torch.manual_seed(0)
    model = ElmoForSequenceClassification(small(num_labels=3)).double().eval()
    with torch.no_grad():
        model.scalar_mix.scores.copy_(torch.tensor([0.3, -1.0, 0.2]))
    layers_of = run(model.elmo, SENTENCES, output_hidden_states=True)[0].hidden_states
    out, tokens = run(model, SENTENCES)
    weights = model.scalar_mix.scores.detach().softmax(0)
    for i in range(len(SENTENCES)):
        words = slice(1, int(tokens["attention_mask"][i].sum()) - 1)
        mean = sum(w * layer[i, words].mean(0) for w, layer in zip(weights, layers_of, strict=True))
        hidden = torch.tanh(model.hidden.weight @ mean + model.hidden.bias)
        expected = model.classifier.weight @ hidden + model.classifier.bias
        torch.testing.assert_close(out.logits[i], expected.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (ElmoModel, AutoModel),
        (ElmoForBidirectionalLM, AutoModelForPreTraining),
        (ElmoForSequenceClassification, AutoModelForSequenceClassification),
    ],
)
def test_save_load_and_auto_classes(tmp_path, kind, auto):
    torch.manual_seed(0)
    model = kind(small()).eval()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is kind
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    found, expected = run(again, SENTENCES)[0][0], run(model, SENTENCES)[0][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_encoder_of_a_language_model_goes_on_in_a_classifier(tmp_path):
    torch.manual_seed(0)
    model = ElmoForBidirectionalLM(small())
    model.save_pretrained(tmp_path)
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    for name, tensor in model.elmo.state_dict().items():
        assert torch.equal(after.elmo.state_dict()[name], tensor), name
    with_mix = ElmoModel.from_pretrained(tmp_path, add_scalar_mix=True)
    assert with_mix.scalar_mix.scores.tolist() == [0, 0, 0]
    assert with_mix.scalar_mix.gamma.tolist() == [1]


def test_initial_weights():
    torch.manual_seed(0)
    model = ElmoModel(small())
    assert not model.characters.embedding.weight[0].any()
    assert model.characters.embedding.weight[1:].all()
    bias = model.backward_layers[1].input.bias
    assert bias[24:36].tolist() == [1] * 12
    assert not bias[:24].any()
    assert not bias[36:].any()
    assert model.characters.highways[0].carry.bias.tolist() == [-2] * 12


def test_published_size():
    with torch.device("meta"):
        model = ElmoModel(ElmoConfig())
    assert round(model.num_parameters() / 1e6, 1) == 93.6


# --- tokens


def test_characters_of_words():
    tokenizer = ElmoTokenizer()
    assert tokenizer.characters("aé") == [259, ord("a") + 1, 0xC3 + 1, 0xA9 + 1, 260] + [261] * 45
    long = tokenizer.characters("y" * 60)
    assert long == [259] + [ord("y") + 1] * 48 + [260]
    found = tokenizer("no", padding=True)
    assert found["input_ids"][0][:4] == [259, 257, 260, 261]
    assert found["input_ids"][-1][:4] == [259, 258, 260, 261]
    assert [len(row) for row in found["input_ids"]] == [50, 50, 50]


def test_cut_words_and_sentences_are_counted():
    tokenizer = ElmoTokenizer()
    assert tokenizer(["a b", "y" * 48, "y" * 49, "é" * 25])["truncated"] == [False, False, True, True]
    cut = tokenizer(["a b c", "a"], truncation=True, max_length=4)
    assert cut["truncated"] == [True, False]
    assert cut["input_ids"][0] == tokenizer("a b")["input_ids"]


def test_words_of_a_text():
    assert ElmoTokenizer().tokenize(" we  won!\n") == ["we", "won!"]
    split = ElmoTokenizer(split_punctuation=True)
    assert split.tokenize("U.S. won't pay $1,000 #GOPDebate!") == [
        *["U.S", ".", "won't", "pay", "$", "1,000", "#", "GOPDebate", "!"]
    ]
    assert split([["we", "won!"]])["input_ids"][0] == ElmoTokenizer()("we won!")["input_ids"]


def test_vocabulary_round_trip(tmp_path):
    tokenizer = ElmoTokenizer.train(["b a b", "c a b é"], size=6, split_punctuation=True)
    assert tokenizer.words == ["</S>", "<S>", "<UNK>", "b", "a", "c"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is ElmoTokenizer
    assert (again.words, again.split_punctuation, len(again)) == (tokenizer.words, True, 262)
    assert again("a zebra c", return_labels=True)["labels"] == [1, 4, 2, 5, 0]
    assert ElmoTokenizer.train(["b a b", "c a b"], size=9, minimum=2).words[3:] == ["b", "a"]
    ElmoTokenizer().save_pretrained(tmp_path / "none")
    assert AutoTokenizer.from_pretrained(tmp_path / "none").words == []


def test_vocabulary_command(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("a b a\nc a b\n")
    arguments = [str(tmp_path / "corpus.txt"), "--size", "5", "--output", str(tmp_path / "tokenizer")]
    assert vocabulary.main(arguments) == 0
    assert "5 words; 16.7% of 6 tokens are <UNK>" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").words[3:] == ["a", "b"]
    assert vocabulary.main([str(tmp_path / "none.txt"), *arguments[1:]]) == 2


def test_clear_errors(files, tmp_path):
    tokenizer = ElmoTokenizer()
    with pytest.raises(InputError, match="a sentence has no word"):
        tokenizer(["we won", " "])
    with pytest.raises(InputError, match="no vocabulary of words"):
        tokenizer("we", return_labels=True)
    with pytest.raises(InputError, match="a pair of texts"):
        tokenizer("we", "won")
    with pytest.raises(InputError, match="padding is 'max_length' and max_length is None"):
        tokenizer("we", padding="max_length")
    (tmp_path / "vocab.txt").write_text("<S>\n</S>\na\n")
    with pytest.raises(InputError, match="lacks <UNK>"):
        ElmoTokenizer(tmp_path / "vocab.txt")
    model, tokens = ElmoForBidirectionalLM(small()), batch(SENTENCES)
    with pytest.raises(InputError, match=r"expected \(sentences, tokens, 50\)"):
        model(tokens["attention_mask"])
    with pytest.raises(InputError, match="padding before or inside"):
        model(tokens["input_ids"], tokens["attention_mask"].flip(1))
    with pytest.raises(InputError, match="labels run from 17 to 17, but the model predicts 17 words"):
        model(**tokens, labels=torch.full_like(tokens["attention_mask"], 17))
    with pytest.raises(InputError, match="activation is 'gelu'"):
        small(activation="gelu")
    with pytest.raises(InputError, match="widths up to max_characters=2"):
        small(max_characters=2)
    with pytest.raises(InputError, match="cannot read the options"):
        ElmoModel.from_allennlp(files[1], files[1])
    with pytest.raises(InputError, match="cannot read the weights"):
        ElmoModel.from_allennlp(files[0], files[0])
    with pytest.raises(InputError, match="has no tensor 'char_embed'"):
        ElmoModel.from_allennlp(files[0], files[2])
    with pytest.raises(InputError, match=r"tensor 'CNN_proj/W_proj' has the shape \(12, 5\); its options say"):
        ElmoModel.from_allennlp(*files[:2], projection_size=6)
    with pytest.raises(InputError, match="has no softmax over words"):
        ElmoModel.from_allennlp(*files[:2], softmax_file=files[2])
    with pytest.warns(UserWarning, match=r"U of ElmoForBidirectionalLM \(17 words\) is random"):
        ElmoForBidirectionalLM.from_allennlp(*files[:2], vocab_size=17)


def test_convert_command(files, tmp_path, capsys):
    folder = files[0].parent
    assert convert.main([str(folder), str(tmp_path / "hub")]) == 0
    assert "ElmoForBidirectionalLM" in capsys.readouterr().out
    found = AutoModelForPreTraining.from_pretrained(tmp_path / "hub").state_dict()
    expected = ElmoForBidirectionalLM.from_allennlp(*files[:2], softmax_file=files[2]).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert type(AutoTokenizer.from_pretrained(tmp_path / "hub")) is ElmoTokenizer
    (folder / "vocab.txt").write_text("<S>\n</S>\n<UNK>\n")
    assert convert.main([str(folder), str(tmp_path / "hub")]) == 2
    assert "has 3 words" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "nothing"), str(tmp_path / "hub")]) == 2
