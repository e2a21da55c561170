"""Changes one line of the method at a time and asks whether a test fails: python tests/mutants.py

Run by hand; some 10 s a mutant. Prints each mutant that survives, and exits 1 if there is one.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_method.py", "tests/test_equations.py", "tests/test_masks.py",
         "tests/test_metrics.py"]
MUTANTS = (  # file, the words that are replaced, what replaces them
    ("trm.py", "F.normalize(g_pos, dim=-1) - F.normalize",
     "F.normalize(g_pos, dim=-1) + F.normalize"),
    ("trm.py", "/ norm.clamp(min=1e-12)", "/ norm.clamp(min=1.0)"),
    ("trm.py", "0.02 * torch.randn", "0.2 * torch.randn"),
    ("trm.py", "nn.init.eye_(self.q.weight)", "nn.init.xavier_uniform_(self.q.weight)"),
    ("trm.py", "nn.init.eye_(self.k.weight)", "nn.init.xavier_uniform_(self.k.weight)"),
    ("trm.py", "Q = self.norm1(Q + self.dropout(attended))[0]", "Q = self.norm1(Q + attended)[0]"),
    ("trm.py", "nn.ReLU(), nn.Dropout(dropout),", "nn.ReLU(), nn.Identity(),"),
    ("trm.py", "x = F.layer_norm(f, (D,))", "x = f"),
    ("trm.py", ".mT / D**0.5", ".mT / D"),
    ("trm.py", "self.norm3(h + self.dropout(self.mlp(h)))", "self.norm3(h + self.mlp(h))"),
    ("trm.py", "regions = region_pool(energy, f)", "regions = region_pool(energy, F.normalize(f, "
                                                   "dim=-1))"),
    ("trm.py", "weights = (spatial_scale * pos)", "weights = (spatial_scale * neg)"),
    ("trm.py", "scale * (weights * (pos - neg))", "scale * (weights * pos)"),
    ("trm.py", "torch.tensor(3.91)", "torch.tensor(4.6)"),
    ("memory.py", "< self.cursor[:, None]", "<= self.cursor[:, None]"),
    ("memory.py", "self.cursor.clamp(1, self.bank.shape[1])", "self.cursor.clamp(min=1)"),
    ("memory.py", "enumerate((1, -1))", "enumerate((-1, 1))"),
    ("memory.py", "self.eta * theta + (1 - self.eta) * s_bar",
     "(1 - self.eta) * theta + self.eta * s_bar"),
    ("memory.py", "torch.where(theta.isnan(), s_bar, moved)", "moved"),
    ("memory.py", "s >= theta_pos", "s > theta_pos + 0.1"),
    ("memory.py", "absent = (s <= theta_neg)", "absent = (s <= theta_pos)"),
    ("memory.py", "in_order = theta_pos > theta_neg", "in_order = theta_pos == theta_pos"),
    ("memory.py", "(verdict == verdict[0]).all(0)", "(verdict == verdict[0]).any(0)"),
    ("memory.py", "torch.where(labels == 0, agree, 0)", "agree"),
    ("losses.py", "p_m = (p - shift).clamp(min=0)", "p_m = p"),
    ("losses.py", "_power(1 - p, gamma_pos)", "_power(1 - p, gamma_neg)"),
    ("losses.py", "_power(p_m, gamma_neg)", "_power(p, gamma_neg)"),
    ("losses.py", "loss = -torch.where", "loss = torch.where"),
    ("losses.py", "torch.where(labels == 0, assume_negative * loss, loss)", "loss"),
    ("losses.py", ".sum(1).mean()", ".mean()"),
    ("losses.py", "log_t = log_t.detach()", "log_s = log_s.detach()"),
    ("losses.py", "temperature**2 * kl.mean()", "kl.mean()"),
    ("losses.py", "if how == \"bernoulli\":\n        kl", "if False:\n        kl"),
    ("losses.py", "F.normalize(anchors.to(wide), dim=-1) / tau", "anchors.to(wide) / tau"),
    ("losses.py", "s.scatter(0, classes[None], -1e9)", "s"),
    ("losses.py", "1 / count[classes] / (count > 0).sum()", "1 / count[classes]"),
    ("losses.py", "L_q + alpha * L_r", "L_q + L_r"),
    ("losses.py", "gamma * L_NCE", "beta * L_NCE"),
    ("train.py", "clip_grad_norm_(parameters, cfg.clip_grad)", "clip_grad_norm_(parameters, 1e9)"),
    ("train.py", "if stage_two and state.memory.text_prototypes.isnan().any():", "if stage_two:"),
    ("train.py", "cfg.seed * 1_000_003 + state.epoch", "cfg.seed * 1_000_003"),
    ("train.py", "torch.where(labels == 0, -1, labels) if cfg.assume_negative",
     "labels if cfg.assume_negative"),
    ("data.py", "random_sample(shape) < ratio", "random_sample(shape) <= 1 - ratio"),
    ("data.py", "        rng.shuffle(negatives)\n", ""),
    ("data.py", "seen[positives[:1]]", "seen[positives[-1:]]"),
    ("data.py", "int(round(share * count))", "int(share * count)"),
    ("data.py", "np.sort(order[count - held:])", "np.sort(order[:held])"),
    ("eval.py", "np.diff(np.sort(-scores)) != 0", "np.diff(np.sort(-scores)) == 0"),
    ("eval.py", "np.maximum.accumulate(precision[::-1])[::-1]", "precision"),
    ("eval.py", "hit / np.maximum(said, 1)", "hit / np.maximum(exist, 1)"),
    ("eval.py", "decided = (scores >= threshold)", "decided = (scores > threshold + 0.1)"),
    ("eval.py", "(np.arange(1, len(s) + 1) + n)", "np.arange(1, len(s) + 1)"),
    ("kernels/region_pool.py", "mask = energy.sigmoid().to(f.dtype)",
     "mask = energy.softmax(-1).to(f.dtype)"),
    ("kernels/region_pool.py", "* s * (1 - s)", "* s"),
    ("kernels/topk_prototypes.py", "descending=True, stable=True", "descending=False, stable=True"),
    ("kernels/topk_prototypes.py", "(cursor[c][:, None] + order) % L", "order % L"),
    ("kernels/topk_prototypes.py", "cursor += count * k", "cursor += count"),
    ("kernels/topk_prototypes.py", "rows = rows / rows.norm(dim=-1, keepdim=True)",
     "rows = rows / 1 * rows.norm(dim=-1, keepdim=True)"),
    ("kernels/topk_prototypes.py", "e = torch.where(e.isnan(), -torch.inf, e)", "e = e + 0"),
    ("kernels/topk_prototypes.py", "(count * k)[c][:, None] - L",
     "(count * k)[c][:, None] - L - 1"),
)


def killed(folder, file, old, new):
    """Whether a test fails when `old` in `file` is replaced by `new`."""
    path = folder / file
    text = path.read_text(encoding="utf-8")
    if old not in text:
        raise ValueError(f"{file} does not hold {old!r} any more: mend the mutant")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                          *TESTS],
                         cwd=folder, capture_output=True, text=True)
    path.write_text(text, encoding="utf-8")
    return run.returncode != 0


def main():
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder,
                        ignore=shutil.ignore_patterns(".venv", ".git", "runs", "generated"))
        for number, mutant in enumerate(MUTANTS, 1):
            if not killed(folder, *mutant):
                survivors += 1
                print(f"survives: {mutant[0]}: {mutant[1]!r} -> {mutant[2]!r}", flush=True)
            elif sys.stderr.isatty():
                print(f"{number} of {len(MUTANTS)}", end="\r", file=sys.stderr)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
