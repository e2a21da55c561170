"""Shows that a change of the code changes no number: the same small runs in two checkouts, compared
tensor by tensor.

    git clone . /tmp/before && git -C /tmp/before checkout HEAD~1
    python tests/golden.py /tmp/before .            # prints a line a run, exits 1 where one differs

Each run is a command as a user types it. What is compared: every tensor of the model, the memory
and the optimizer, the text features, the thresholds, and metrics.jsonl without its times. Both
checkouts read the same scenes, drawn by the first.
"""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

CLOCK = ("seconds", "images_per_second", "waiting")
SMALL = ("--data scenes --root {world}/scenes --ratio 0.5 --clip "
         "{world}/clip-quickgelu.safetensors --size 64 --epochs 3 --batch 8 --context 4 --queue 8 "
         "--workers 0 --cache-features 1")
RUNS = {  # name: what follows SMALL; a later option wins
    "full": "",
    "resumed": "",  # stopped after its first epoch, then resumed
    "uncached": "--cache-features 0 --augment taidpt --workers 1",
    "dualcoop": "--matching dualcoop",
    "global": "--matching global",
    "average": "--matching average",
    "largeloss": "--ratio 1 --single-positive largeloss",
    "no-mmcp-mmcl": "--without mmcp,mmcl",
    "no-kd-text": "--without kd,text",
    "carl-from": "--carl-from {out}/full",
    "captions": "--images captions --ratio 1 --matching dualcoop --epochs 2",
    "sheet": "--data {world}/sheet.csv --root {world}/scenes --ratio 1",
    "pseudo": "--pseudo-in-contrastive --kd bernoulli --kd-teacher both --score query --queries "
              "random",
    "two-processes": "",
}
RENAMED = {"T": "text_prototypes"}  # of earlier versions
KEPT = ("model", "memory", "optimizer", "g_pos", "g_neg", "threshold", "names")

WORLD = """
import sys, torch; sys.path[:0] = [{code!r}, {code!r} + "/tests"]
from pathlib import Path; import small_world
small_world.make(Path({world!r}))
"""


def world(code, folder):
    if not (folder / "sheet.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", WORLD.format(code=str(code), world=str(folder))],
                       check=True)
        content = json.loads((folder / "scenes/annotations/instances_train2014.json").read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        lines = [",".join(["image", *names.values()])]
        for n, image in enumerate(content["images"]):
            there = {a["category_id"] for a in content["annotations"]
                     if a["image_id"] == image["id"]}
            cells = ["" if (n + k) % 3 == 0 else str(int(k in there)) for k in names]
            lines.append(",".join(["train2014/" + image["file_name"], *cells]))
        (folder / "sheet.csv").write_text("\n".join(lines) + "\n")


def train(code, words, stop_after=None, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}",
                  "--master-port=29517"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen([*start, "train.py", *words], cwd=code, env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if stop_after:
        for line in run.stdout:
            if line.startswith(stop_after):
                run.kill()
                break
    _, error = run.communicate()
    if run.returncode and not stop_after:
        sys.exit(f"{code}: train.py {' '.join(words)}\n{error}")


def digest(value):
    """sha256 of nested dicts, lists, tensors and plain values."""
    sha = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(str((value.dtype, tuple(value.shape))).encode()
                   + value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        sha.update("".join(f"{k}={digest(value[k])}" for k in sorted(value, key=str)).encode())
    elif isinstance(value, (list, tuple)):
        sha.update("".join(map(digest, value)).encode())
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest()


def result(code, out, folder, name):
    """{part: hash} of a finished run."""
    words = f"{SMALL} {RUNS[name]} --cache-dir {out}/features --out {out}/{name}"
    words = words.format(world=folder, out=out).split()
    train(code, words, "epoch   1" if name == "resumed" else None, 2 if name == "two-processes"
          else 1)
    if name == "resumed":
        train(code, ["--resume", f"{out}/{name}"])
    state = torch.load(out / name / "last.pt", weights_only=True, map_location="cpu")
    lines = map(json.loads, (out / name / "metrics.jsonl").read_text().splitlines())
    history = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    state["memory"] = {RENAMED.get(name, name): value for name, value in state["memory"].items()}
    return {part: digest(state[part]) for part in KEPT} | {f"epoch {line['epoch']}": line
                                                           for line in history}


def same(before, after):
    """Equal; a later commit may note more numbers."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(key in after and same(value, after[key]) for key, value in before.items())
    return before == after


def main(before, after, *names):
    base = Path("/tmp/trm-golden")
    world(before, base / "world")
    wrong = 0
    for name in names or RUNS:
        results = []
        for code in (before, after):
            commit = subprocess.check_output(["git", "-C", code, "rev-parse", "HEAD"])
            out = base / hashlib.sha256(str(code.resolve()).encode() + commit).hexdigest()[:12]
            kept = out / f"{name}.json"
            if code is before and kept.exists():  # the same commit gives the same again
                results.append(json.loads(kept.read_text()))
                continue
            subprocess.run(["rm", "-rf", out / name,
                            *([out / "features"] if name == "full" else [])])
            out.mkdir(parents=True, exist_ok=True)
            results.append(json.loads(json.dumps(result(code, out, base / "world", name))))
            kept.write_text(json.dumps(results[-1]))
        differ = [part for part in results[0] if not same(results[0][part], results[1].get(part))]
        wrong += bool(differ)
        print(f"{name:16s}", "differs in " + ", ".join(differ) if differ else "equal", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
