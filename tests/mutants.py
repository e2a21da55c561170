"""Changes one line of the method at a time and asks whether a test fails: python tests/mutants.py

Run by hand, some 20 s a mutant; with `0 2` and `1 2` as arguments in two halves. Prints each mutant
that survives, and exits 1 if there is one.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHOD = ["tests/test_method.py", "tests/test_equations.py"]
TESTS = {  # the tests that should notice, the quick ones first
    "trm.py": METHOD, "memory.py": METHOD, "losses.py": METHOD,
    "train.py": [*METHOD, "tests/test_report.py", "tests/test_train.py"],
    "data.py": ["tests/test_masks.py", "tests/test_augment.py", "tests/test_data.py"],
    "eval.py": ["tests/test_metrics.py", "tests/test_report.py", "tests/test_train.py"],
    "tools/zero_shot.py": ["tests/test_mixed.py"],
    "kernels/match.py": [*METHOD, "tests/test_kernels.py"],
    "kernels/region_pool.py": [*METHOD, "tests/test_kernels.py"],
    "kernels/topk_prototypes.py": [*METHOD, "tests/test_kernels.py"]}
MUTANTS = (  # file, the words that are replaced, what replaces them
    ("trm.py", "F.normalize(g_pos, dim=-1) - F.normalize",
     "F.normalize(g_pos, dim=-1) + F.normalize"),
    ("trm.py", "F.normalize(g.float(), dim=-1).chunk(2)", "g.float().chunk(2)"),
    ("trm.py", '"eot", eot + M', '"eot", eot + M - 1'),
    ("trm.py", "self.dropout(energy.softmax(-1)) @ x", "self.dropout(energy.sigmoid()) @ x"),
    ("trm.py", "self.dropout(energy.softmax(-1)) @ x", "energy.softmax(-1) @ x"),
    ("trm.py", "self.out(self.v(mixed))", "self.v(mixed)"),
    ("trm.py", "self.norm2(Q + self.dropout(attended))", "self.norm2(self.dropout(attended))"),
    ("trm.py", "self.norm2(Q + self.dropout(attended))", "self.norm2(Q + attended)"),
    ("trm.py", "match(queries, g_pos, g_neg, scale)", "match(regions, g_pos, g_neg, scale)"),
    ("trm.py", "requires_grad=learned", "requires_grad=True"),
    ("trm.py", "else f.mean(1)", "else f.amax(1)"),
    ("trm.py", "0.02 * torch.randn", "0.2 * torch.randn"),
    ("trm.py", "nn.init.eye_(self.q.weight)", "nn.init.xavier_uniform_(self.q.weight)"),
    ("trm.py", "nn.init.eye_(self.k.weight)", "nn.init.xavier_uniform_(self.k.weight)"),
    ("trm.py", "Q = self.norm1(Q + self.dropout(attended))[0]", "Q = self.norm1(Q + attended)[0]"),
    ("trm.py", "nn.ReLU(), nn.Dropout(dropout),", "nn.ReLU(), nn.Identity(),"),
    ("trm.py", "x = F.layer_norm(f, (D,))", "x = f"),
    ("trm.py", ".mT / D**0.5", ".mT / D"),
    ("trm.py", "self.norm3(h + self.dropout(self.mlp(h)))", "self.norm3(h + self.mlp(h))"),
    ("trm.py", "kernels.region_pool(energy, f)",
     "kernels.region_pool(energy, F.normalize(f, dim=-1))"),
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
    ("memory.py", ".masked_fill(self.cursor[:, None] == 0, torch.nan)", ""),
    ("memory.py", "/ r.norm(dim=-1).clamp(min=1e-12)", ""),
    ("memory.py", "& ~s.isnan()", ""),
    ("memory.py", "torch.where(s_bar.isnan(), theta, moved)", "moved"),
    ("memory.py", "F.normalize(g_pos.to(self.bank.dtype), dim=-1)", "g_pos.to(self.bank.dtype)"),
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
    ("losses.py", "s.scatter_(0, classes[None], -1e9)", "s"),
    ("losses.py", "1 / count[classes] / (count > 0).sum()", "1 / count[classes]"),
    ("losses.py", "L_q + alpha * L_r", "L_q + L_r"),
    ("losses.py", "gamma * L_NCE", "beta * L_NCE"),
    ("train.py", "clip_grad_norm_(parameters, cfg.clip_grad)", "clip_grad_norm_(parameters, 1e9)"),
    ("train.py", "if stage_two and memory.text_prototypes.isnan().any():", "if stage_two:"),
    ("train.py", "cfg.seed * 1_000_003 + state.epoch", "cfg.seed * 1_000_003"),
    ("train.py", "torch.where(labels == 0, -1, labels) if cfg.assume_negative",
     "labels if cfg.assume_negative"),
    ("train.py", "out.energy, gather(f, len(labels)), labels, cfg.topk)",
     "out.energy, gather(f, len(labels)), labels.abs(), cfg.topk)"),
    ("train.py", "completed = labels if pseudo is None", "completed = labels if True"),
    ("train.py", "(completed if cfg.pseudo_in_contrastive else labels) == 1", "completed == 1"),
    ("train.py", "stage_two = state.epoch >= cfg.first_stage",
     "stage_two = state.epoch > cfg.first_stage"),
    ("train.py", "model.prompts(encoder)[0]", "model.prompts(encoder)[1]"),
    ("train.py", 'model.heads["text"](g_pos)', 'model.heads["text"](g_neg)'),
    ("trm.py", 'self.heads["pixel"](memory.bank[filled])',
     'self.heads["region"](memory.bank[filled])'),
    ("train.py", "losses.asymmetric(out.logits_q, completed",
     "losses.asymmetric(out.logits_q, labels"),
    ("train.py", "    state.scheduler.step()\n", ""),
    ("train.py", "        memory.update_thresholds(s, assumed)", "        s = s"),
    ("train.py", "+ loader.rank)", ")"),
    ("eval.py", 'numbers[split]["mAP"] <= state.best["mAP"]', 'numbers[split]["mAP"] < 0'),
    ("train.py", "weight_decay=cfg.weight_decay", "weight_decay=0.0"),
    ("train.py", "max_lr=cfg.lr", "max_lr=2 * cfg.lr"),
    ("data.py", "random.Random(f\"{self.seed},{epoch},{index}\")",
     "random.Random(f\"{self.seed},{index}\")"),
    ("data.py", "1200 + cfg.seed", "1200"),
    ("data.py", "partial_mask(train.labels.shape, cfg.ratio, cfg.seed)",
     "partial_mask(train.labels.shape, cfg.ratio, 0)"),
    ("data.py", "held_rows = held_rows[~train.unused[held_rows]]", "pass"),
    ("data.py", "rows = rows[~train.unused[rows]][:cfg.train_images]",
     "rows = rows[~train.unused[rows]]"),
    ("data.py", "np.array(place) < share * 2**32", "np.array(place) < 2**31"),
    ("tools/zero_shot.py", "(n + 3) / (2 * n + 3)", "3 / (2 * n + 3)"),
    ("tools/zero_shot.py", "logit.mean(0) - slope * zero.mean(0)", "logit.mean(0)"),
    ("tools/zero_shot.py", "(F.normalize(f, dim=-1) @ g.T).amax(1)",
     "(F.normalize(f, dim=-1) @ g.T).mean(1)"),
    ("kernels/match.py", "norm.clamp(min=SMALLEST)", "norm"),
    ("kernels/match.py", "(x * difference).sum(-1) / norm", "(x * difference).sum(-1) / norm**2"),
    ("kernels/match.py", "- s[:, None] * unit)", "+ s[:, None] * unit)"),
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
                          *TESTS[file]],
                         cwd=folder, capture_output=True, text=True)
    path.write_text(text, encoding="utf-8")
    return run.returncode != 0


def main(first=0, step=1):
    survivors, mutants = 0, MUTANTS[int(first)::int(step)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder,
                        ignore=shutil.ignore_patterns(".venv", ".git", "runs", "generated"))
        for number, mutant in enumerate(mutants, 1):
            if not killed(folder, *mutant):
                survivors += 1
                print(f"survives: {mutant[0]}: {mutant[1]!r} -> {mutant[2]!r}", flush=True)
            elif sys.stderr.isatty():
                print(f"{number} of {len(mutants)}", end="\r", file=sys.stderr)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
