"""Random ELMo files in the published layout, and the model they describe in plain NumPy, float64, word by word."""

import json

import h5py
import numpy as np

FILTERS = [[1, 3], [2, 4], [3, 5]]
CHARACTER, CELL, PROJECTION, VOCABULARY = 4, 12, 5, 17


def write(folder, seed=0, skip=True, size=0.5, activation="relu", **more):
    """options.json, weights.hdf5 and softmax.hdf5 with random numbers; returns their paths."""
    generator = np.random.default_rng(seed)
    cnn = {"embedding": {"dim": CHARACTER}, "filters": FILTERS, "n_highway": 2, "activation": activation}
    cnn |= {"max_characters_per_token": 50, "n_characters": 262}
    lstm = {"dim": CELL, "projection_dim": PROJECTION, "n_layers": 2, "cell_clip": 0.6, "proj_clip": 0.5}
    options = {"char_cnn": cnn, "lstm": lstm | ({"use_skip_connections": True} if skip else {}), **more}
    paths = [folder / name for name in ("options.json", "weights.hdf5", "softmax.hdf5")]
    paths[0].write_text(json.dumps(options))
    filters = sum(number for _, number in FILTERS)

    def put(file, name, *shape):
        file[name] = (size * generator.standard_normal(shape)).astype(np.float32)

    with h5py.File(paths[1], "w") as file:
        put(file, "char_embed", 261, CHARACTER)
        for i, (width, number) in enumerate(FILTERS):
            put(file, f"CNN/W_cnn_{i}", 1, width, CHARACTER, number)
            put(file, f"CNN/b_cnn_{i}", number)
        for i in range(2):
            for name in ("carry", "transform"):
                put(file, f"CNN_high_{i}/W_{name}", filters, filters)
                put(file, f"CNN_high_{i}/b_{name}", filters)
        put(file, "CNN_proj/W_proj", filters, PROJECTION)
        put(file, "CNN_proj/b_proj", PROJECTION)
        for direction in range(2):
            for depth in range(2):
                cell = f"RNN_{direction}/RNN/MultiRNNCell/Cell{depth}/LSTMCell"
                put(file, f"{cell}/W_0", 2 * PROJECTION, 4 * CELL)
                # In float32 too, one more is then exact.
                file[f"{cell}/B"] = generator.integers(-512, 512, 4 * CELL).astype(np.float32) / 1024
                put(file, f"{cell}/W_P_0", CELL, PROJECTION)
    with h5py.File(paths[2], "w") as file:
        put(file, "softmax/W", VOCABULARY, PROJECTION)
        put(file, "softmax/b", VOCABULARY)
    return paths


class Oracle:
    """What the files say, computed one sentence, one word and one step at a time."""

    def __init__(self, options, weights, softmax=None):
        self.options = json.loads(options.read_text())
        self.tensors = {}
        for path in [weights] + ([softmax] if softmax else []):
            with h5py.File(path) as file:
                names = []
                file.visit(names.append)
                self.tensors |= {n: file[n][()].astype(np.float64) for n in names if isinstance(file[n], h5py.Dataset)}

    @staticmethod
    def characters(word):
        """Bytes between 258 and 259, filled up with 260; 256 and 257 alone for the ends of a sentence."""
        inner = [word] if isinstance(word, int) else list(word.encode())[:48]
        row = [258, *inner, 259]
        return row + [260] * (50 - len(row))

    def word(self, word):
        t, cnn = self.tensors, self.options["char_cnn"]
        table = t["char_embed"][self.characters(word)]
        squash = (lambda x: np.maximum(x, 0)) if cnn["activation"] == "relu" else np.tanh
        found = []
        for i, (width, _) in enumerate(cnn["filters"]):
            kernel, bias = t[f"CNN/W_cnn_{i}"][0], t[f"CNN/b_cnn_{i}"]
            windows = [np.einsum("wd,wdn->n", table[p : p + width], kernel) + bias for p in range(50 - width + 1)]
            found.append(squash(np.max(windows, axis=0)))
        x = np.concatenate(found)
        for i in range(cnn["n_highway"]):
            carry = 1 / (1 + np.exp(-(x @ t[f"CNN_high_{i}/W_carry"] + t[f"CNN_high_{i}/b_carry"])))
            new = np.maximum(x @ t[f"CNN_high_{i}/W_transform"] + t[f"CNN_high_{i}/b_transform"], 0)
            x = carry * new + (1 - carry) * x
        return x @ t["CNN_proj/W_proj"] + t["CNN_proj/b_proj"]

    def lstm(self, direction, depth, inputs, state=None):
        lstm, name = self.options["lstm"], f"RNN_{direction}/RNN/MultiRNNCell/Cell{depth}/LSTMCell"
        w, b, p = (self.tensors[f"{name}/{x}"] for x in ("W_0", "B", "W_P_0"))
        h, c = state or (np.zeros(p.shape[1]), np.zeros(p.shape[0]))
        outputs = []
        for x in inputs:
            i, j, f, o = np.split(np.concatenate([x, h]) @ w + b, 4)
            sigmoid = [1 / (1 + np.exp(-gate)) for gate in (i, f + 1, o)]
            c = np.clip(sigmoid[1] * c + sigmoid[0] * np.tanh(j), -lstm["cell_clip"], lstm["cell_clip"])
            h = np.clip((sigmoid[2] * np.tanh(c)) @ p, -lstm["proj_clip"], lstm["proj_clip"])
            outputs.append(h)
        return outputs, (h, c)

    def layers(self, sentence, states=None):
        """(layers, tokens, 2 · projection) of a sentence of words; `states` is carried on, in place."""
        states = {} if states is None else states
        words = [self.word(w) for w in [256, *sentence.split(), 257]]
        found = []
        for direction in range(2):
            x = words[::-1] if direction else words
            layers = [x]
            for depth in range(2):
                out, states[direction, depth] = self.lstm(direction, depth, x, states.get((direction, depth)))
                skip = depth and self.options["lstm"].get("use_skip_connections")
                x = [a + b for a, b in zip(out, x, strict=True)] if skip else out
                layers.append(x)
            found.append(np.array([layer[::-1] if direction else layer for layer in layers]))
        return np.concatenate(found, axis=2)

    def loss(self, sentence, targets):
        """Σ −log p of both directions; `targets` are the word ids of the tokens, ends included."""
        top = self.layers(sentence)[-1]
        w, b, total = self.tensors["softmax/W"], self.tensors["softmax/b"], 0.0
        for t in range(len(top) - 1):
            for state, target in ((top[t, :PROJECTION], targets[t + 1]), (top[t + 1, PROJECTION:], targets[t])):
                logits = w @ state + b
                total += np.log(np.exp(logits).sum()) - logits[target]
        return total
