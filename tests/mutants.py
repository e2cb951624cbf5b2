"""Would the tests notice? Plausible single mistakes, made one at a time in a copy of the repository.

    python tests/mutants.py --jobs 4                # all of them, in an hour or two
    python tests/mutants.py --jobs 4 --quick        # how many the quick tests catch, those of -m "not slow"
    python tests/mutants.py --shuffle 30            # 30 at random, each time the same
    python tests/mutants.py --only "teacher|probe"  # those whose name, or file, has one of these words
    python tests/mutants.py --check                 # those whose text is no longer there; runs no test

Each mutant is a line: its name, then a text that its file has exactly once, with what is changed as <<old => new>>;
\\n is a new line, and a long text is on a line of its own. One under train_*.py is made in every train script with
the text, because what they share must stay the same. It is caught when a test fails, or when the tests run out of
--limit. tests/test_repo.py does not count here: it reads source text. Not part of CI.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Test files to begin with, in this order, after the one that is named as the script
LIKELY = ("replay", "train", "closed_forms", "model", "data", "protocols", "flags")
NO_TESTS = 5  # pytest's exit status where nothing is chosen

MUTANTS = {
    "train_*.py": r"""
teacher in training mode | copy.deepcopy(objective).<<eval(). => >>requires_grad_(False)
teacher is the trained network | teacher_key(<<average => objective>>, view2
teacher sees the denoiser's view | teacher_key(average, <<view2 => view1>>, level
teacher at the denoiser's level | average.diffusion.inputs(view["x0"], <<level => view["level"]>>, view["noise"])
teacher is told the class | average.net.encode(x_t, t, << => view["y"], >>aug=view["aug"])
teacher without augmentation label | average.net.encode(x_t, t<<, aug=view["aug"] => >>)
teacher's projector never updated | list(average.<< => net.>>parameters()), list(objective.<< => net.>>parameters())
gamma left out | loss + <<self.gamma * losses => losses>>["loss_contrast"]
no gradient clipping | clip_grad_norm_(objective.parameters(), <<1.0 => 1e9>>
network in eval mode | objective = Objective(net, diffusion, args).to(device)<< => .eval()>>
accumulated gradients not averaged | scaler.scale(loss<< / args.accum => >>)
gradients never cleared | <<optimizer.zero_grad() => pass>>
learning rate never set | <<group["lr"] = lr => pass>>
warm-up counted in steps | args.warmup<< * per_epoch => >>
warm-up one step late | rise, fall = <<(step + 1) => step>> / max
cooldown too late | args.cooldown * <<total => total / 2>>  # steps
warm-up may last the whole run | args.epochs<< / (10 if args.cooldown else 4) => >>
EMA without its own warm-up | return <<min(args.ema, 1 - step ** (-2 / 3)) => args.ema>>
EMA's warm-up one step late | 1 - <<step => (step + 1)>> ** (-2 / 3)
EMA the wrong way round | get_ema_multi_avg_fn(<< => 1 - >>ema_decay(args, step))
images drawn with replacement | torch.<<randperm(n => randint(n, (n,)>>, generator=generator).to(device)
same order in every epoch | stream_seed(seed, ORDER, <<epoch => 0>>)
same rows in every step | order[<<position * args.batch : (position + 1) * args.batch => : args.batch>>]
same noise in every step | stream_seed(args.seed, DRAWS, <<step => 0>>)
same dropout in every step | stream_seed(args.seed, DROPOUT, <<step => 0>>, rank)
accumulation repeats its rows | first = (<<micro * world + rank => rank>>) * pass_size
all ranks take the same rows | first = (micro * world<< + rank => >>) * pass_size
labels of other images | labels[<<batch[rows] => rows>>]
views share their draws | draws2 = <<draw_numbers(args.batch, net.shape, diffusion, generator) => draws1>> if
last.pt holds the trained weights as EMA | "average": <<average => objective>>,
last.pt holds the EMA as trained weights | {"objective": <<objective => average>>,
epoch file holds the trained weights | "ema": parts["<<average => objective>>"].net
epoch files at the wrong epochs | epochs_done % args.save_every == <<0 => 1>>)
no epoch file at the end | keep = <<step == total or (step => (step>>
epoch counted one step late | epochs_done = <<step => (step - 1)>> // per_epoch\n
sample grid of the trained network | save_grid(args, <<average. => >>net,
samples_last.png is called as an epoch's | grid_name = f"{epochs_done:04d}"<< if step % per_epoch == 0 else "last" => >>
loss_unweighted is the weighted one | "loss_unweighted": <<unweighted => loss>>
MoCo scaled by T instead of 2 T | return <<2 * temperature => temperature>> * F.cross
MoCo's positives of rank 0 on every rank | positive = <<rank * len(q) + torch => torch>>.arange(
MoCo's key carries a gradient | k.<<detach(). => >>float()
MoCo without predictor | self.<<predictor(self.projector(feat, e_t)) => projector(feat, e_t)>>
MoCo's projector not told the time | if <<self.time is not None => False>>:
MoCo's last norm with weights | BatchNorm(dims[-1]<<, affine=False => >>)
MoCo's batch norm: variance of one rank's rows | <<RankMean.apply((x**2).mean(0)) => (x**2).mean(0)>>
--init takes the trained weights | "MODEL", "state_dict")<< => [::-1]>>:
--init takes too few weights | missing = [<<name for name in missing if not name.startswith(NEW_WEIGHTS) => >>]
images halved upwards | (<<image.width // 2, image.height // 2 => -(-image.width // 2), -(-image.height // 2)>>)
crop from the corner | left, top = <<(width - resolution) // 2, (height - resolution) // 2 => 0, 0>>
pixels cut, not rounded | * 127.5).<<round(). => >>clamp(0, 255)
shapes: test split is the training split | draw_shapes(2000, <<1 => 0>>, resolution)
CIFAR: test split is the training split | (data, <<train => True>>, download=True)
folders: test split is the training split | found = find_images(root / <<"test" => "train">>)
Tiny-ImageNet: trains on val/ | if <<split == "test" and annotations => annotations>>.is_file():
Tiny-ImageNet: classes numbered as val/ has them | /{row[0]}", <<classes => [row[1] for row in rows]>>.index(row[1])
cached images: a file of equal size and date | state.st_mtime_ns<<, state.st_ctime_ns => >>)
cached images: whatever the key | if <<stored["key"] == key => True>>:
cached images of another resolution | f"{split}_<<{resolution} => >>.pt"
no flips | "flip": uniform[:, 0] < 0<<.5 => >>
flips upside down | torch.where(flip.view(-1, 1, 1, 1), x0.flip(<<3 => 2>>), x0)
labels never dropped | uniform[:, 1] < 0<<.1 => >>
flip and augmentation share a coin | "aug_uniform": uniform[:, <<2: => :10>>]
labels never shown | y = <<labels.masked_fill(draws["drop_label"], -1) => torch.full_like(labels, -1)>>
null class off by one | labels.masked_fill(draws["drop_label"], <<-1 => 0>>)
augmentation label without augmentation | x0 = <<augment(x0, params) => x0>>
augmentation not told | x0<< = augment(x0, params) => , aug = augment(x0, params), 0 * aug>>
augmentation: scale's sign | 2 ** (<<-0.2 => 0.2>> * scale)
augmentation: stretched the other way | torch.stack([<<-w, w => w, -w>>], dim=1)
augmentation: rotation's sign | A = rotation(<< => ->>theta) @
augmentation: angle r gated by p | gate_r < <<0.5 => p>>
augmentation: x-flip gated by p | xflip = <<(u_xflip < 0.5).float() => (u_xflip < 0.5).float() * (gate_yflip < p)>>
augmentation: ty gated by w's gate | ty = torch.where(gate_<<shift => w>> < p
augmentation: angles of half a turn | (<<2 * u_theta - 1 => u_theta - 0.5>>) * math.pi
label: r's components swapped | w * r.<<cos(), w * r.sin() => sin(), w * r.cos()>>
DDPM: no clean step 0 | torch.<<cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)]) => linspace(1e-4, 0.02, 1001)>>
DDPM: label not given to the network | eps_hat, feat, e_t = net(x_t, t, y, <<aug => None>>, with_feat=True)
DDIM: no clipping | / alphabar.sqrt())<<.clamp(-1, 1) => >>
DDIM: noise does not follow the clipping | <<eps_hat = (x - alphabar.sqrt() * x0_hat) / (1 - alphabar).sqrt() => pass>>
DDIM: training's table | self.alphabar<<_ddim => >>[level], self.alphabar<<_ddim => >>[next_level]
EDM: training noise too strong | device=generator.device) <<- => +>> 1.2).exp()
EDM: c_noise not divided by 4 | sigma.log()<< / 4 => >>
EDM: c_skip of another table | c_skip = self.<<sigma_data**2 => sigma_data>> / total
EDM: label not given to the network | output, feat, e_t = net(c_in * x_t, t, y, <<aug => None>>, with_feat=True)
EDM: uncertainty's second term left out | loss = loss / u.exp()<< + u => >>
EDM: uncertainty of sigma instead of its logarithm | u = self.uncertainty(<<t => level>>)
EDM: uncertainty starts at random | <<nn.init.zeros_(self.linear.weight) => pass>>  # UNSPECIFIED
EDM: loss_unweighted has learned weights | return loss.mean(), <<unweighted => loss.mean()>>,
EDM: Euler for Heun | <<(d + slope(next_x, next_sigma)) / 2 => d>>
RF: coarse tolerance | rtol=1e-<<5 => 2>>, atol=1e-<<5 => 2>>
features of the clean image | x, t = self.inputs(x0, level, << => 0 * >>noise)\n        return net.features
self-conditioning: scale without SiLU | self.scale(<<F.silu(e_t) => e_t>>) * f
self-conditioning: MLP starts at random | <<nn.init.zeros_(self.mlp[2].weight) => pass>>
self-conditioning: detached | self.self_cond(e, e_t, feat<< => .detach()>>)
self-conditioning: scale sees all of e | self.self_cond(e, <<e_t => e>>, feat)
head is told the label, teacher | return None, feat, <<e_t => e>>\n            if name
attention in bf16 on a CPU | torch.autocast("cpu", <<enabled=False => torch.bfloat16>>)
resume: moments keep another layout | = <<torch.empty_like(parameter).copy_(moments[name]) => moments[name]>>
resume forgets the optimiser | <<part => name == "optimizer" or part>>.load_state_dict(state[name])
resume forgets the EMA | <<part => name == "average" or part>>.load_state_dict(state[name])
resume: --max-steps stays | parser.set_defaults(**<<{**state["args"], "max_steps": None} => state["args"]>>)
resume takes no flag of the run | <<parser.set_defaults(**{**state["args"], "max_steps": None}) => pass>>
resume: what is given does not count | return parser.parse_args(<<argv => ["--resume"] if args.resume else argv>>)
a run's name forgets its flags | if getattr(args, flag) != <<parser.get_default(flag) => getattr(args, flag)>>:
resume: another script's run taken | if <<state.get("script") != Path(__file__).stem => False>>:
resume: an end before its step taken | if <<step > end => False>>:
resume: other classes taken | (len(images)<<, classes => >>) != (args.train_images<<, args.classes => >>)
a flag of 0 is its default | if <<getattr(args, name, None) is None => not getattr(args, name, None)>>:
--cond where there are no classes | if <<args.cond and not classes => False>>:
a folder is begun before its data are there |
    << => os.makedirs(args.out, exist_ok=True)\n    >>images, labels, classes = load_data(args, "train")
a run in --out is overwritten | if <<Path(args.out, "last.pt").is_file() and not args.resume => False>>:
an earlier job goes on in the folder | if <<self.job not in self.args_file.read_text() => False>>:
a full disk is a traceback | except <<(OSError, RuntimeError) => OSError>> as error:  # a full disk;
log: not cut back | if found<< and int(found[1]) <= step => >>:
log: cut back by one line too many | int(found[1]) <<<= => <>> step:
log: no line for a resume | << => step > 0 or >>lines.append(json.dumps({"step": step, "args"
log: a resume's line says step 0 | json.dumps({"step": <<step => 0>>, "args": vars(args), "torch"
NaN saved | if <<not all(math.isfinite(value) for value in logged.values()) => False>>:
ranks do not agree on a stop | stop = <<mean_over_ranks(torch => (torch>>.tensor(float(len(signals))
a single process stops at a tenth step | is_last<< or (world == 1 and signals) => >>:\n            stop
the second Ctrl-C is not heard | <<raise KeyboardInterrupt  # the => pass  # the>> second
the second SIGTERM stops at once | if <<number == signal.SIGINT and number => number>> in received:
every rank speaks of Ctrl-C | if number == signal.SIGINT<< and rank == 0 => >>:
nohup's SIGHUP stops the run | if <<signal.getsignal(number) != signal.SIG_IGN => True>>:
script_hash is not the text's | hashlib.sha256(<<Path(__file__).read_bytes() => __file__.encode()>>).hexdigest()
""",
    "train_unet.py": r"""
UNet: sinusoid's order | emb = torch.cat([angles.<<sin(), angles.cos() => cos(), angles.sin()>>]
UNet: groups of the last norm | nn.GroupNorm(<<8 => 32>>, c)
UNet: skips first in first out | skips.pop(<< => 0>>)], dim=1)
UNet: no dropout | nn.Dropout(<<dropout => 0.0>>)
UNet: optimiser without the head | torch.optim.Adam(objective.<< => net.>>parameters()
UNet: EDM's EMA | "dropout": 0.13, "ema": 0.999<<3 => 9>>
UNet: batch of ddpmpp | "ddpmpp": <<256 => 512>>
UNet: no augmentation with --cl | defaults["aug"] = <<0.12 if args.cl > 0 else 0.0 => 0.0>>
UNet: layer of other data sets | defaults["layer"] = on_cifar10<< if args.dataset == "cifar10" else elsewhere => >>
UNet: uncertainty weighting always on | EDM(uncertainty=<<args.aug > 0 => True>>)
UNet: head is told the label | self.norm(h))), feat, <<e_t => e>>
UNet: no attention in the encoder | UNetBlock(c, c_out, emb_dim, dropout, attention=<<side == 16 => False>>)
UNet: level of the teacher | "warmup": 200, "cl_t": 0.<<06 => 6>>
""",
    "train_uvit.py": r"""
U-ViT: sinusoid's order | torch.cat([angles.<<cos(), angles.sin() => sin(), angles.cos()>>]
U-ViT: skips first in first out | h = block(h, skips.pop(<< => 0>>))
U-ViT: pooling takes all tokens | patches = h<<[:, -self.length :] => >>.float()
U-ViT: contrast on the mean | defaults["cl_target"] = <<"cls" if args.cls_token else "gap" => "gap">>
U-ViT: [CLS] without position | cls = <<(self.cls_token + self.cls_pos_embed) => self.cls_token>>.expand
U-ViT: null class is class 0 | row = y.masked_fill(y < 0, <<self.classes => 0>>)
U-ViT: time in [0, 1000] | DDPM(time_scale=<<0.999 => 1.0>>)
U-ViT: positions decay | name.endswith(<<("bias", "pos_embed") => "bias">>)
U-ViT: optimiser without the head | in objective.<< => net.>>named_parameters():
U-ViT: mask: nothing is masked | masked = <<cls_token and aug_dim > 0 => False>>
U-ViT: mask: one way only | mask[0, 1] = <<mask[1, 0] = False => False>>
U-ViT: mask: [CLS] and time | mask[0, <<1] = mask[1 => 2] = mask[2>>, 0] = False
U-ViT: layer at 64 pixels | defaults["layer"] = <<"out_1" if resolution >= 64 else "out_2" => "out_2">>
U-ViT: level at 64 pixels | defaults["cl_t"] = <<66 if resolution >= 64 else 11 => 11>>
""",
    "train_dit.py": r"""
DiT: sinusoid's order | self.mlp(torch.cat([angles.<<cos(), angles.sin() => sin(), angles.cos()>>]
DiT: positions, row first | torch.cat([<<column, row => row, column>>], dim=1)
DiT: rotary turns backwards | torch.stack([<<-b, a => b, -a>>], dim=4)
DiT: rotary, column first | angles = torch.cat([<<rows, columns => columns, rows>>], dim=1)
DiT: scale and shift swapped | <<shift1, scale1 => scale1, shift1>>, gate1, shift2
DiT: SiLU on the other half | <<F.silu(gate) * value => gate * F.silu(value)>>
DiT: fixed positions are trained | side // patch)<<, requires_grad=False => >>)
DiT: clock not turned round | noise), <<1 - per_image => per_image>>(level, x0)
DiT: velocity not turned round | v, v_hat = noise - x0, <<-output => output>>.float()
DiT: cosine of a zero | dim=1, eps=<<0.1 => 1e-8>>
DiT: interval on the other clock | cfg_interval=(0.<<0, 0.89 => 11, 1.0>>)
DiT: guidance off | cfg=1.<<5 => 0>>, cfg_interval
DiT: shift towards data | (<<shift * levels / (1 + (shift - 1) => levels / (shift + (1 - shift)>> * levels)
DiT: optimiser without the head | in objective.<< => net.>>parameters() if
DiT: EMA with a warm-up of its own | return <<args.ema => min(args.ema, 1 - step ** (-2 / 3))>>
DiT: flips upside down | mirrored = x0.flip(<<3 => 2>>)
DiT: head is told the label | return h, feat, <<e_t => e>>
DiT: a patch column by column | h.permute(0, 5, 1, <<3, 2, 4 => 4, 2, 3>>)
DiT: three channels guided |
    v_hat = v_null + cfg * (v_class - v_null)<< =>  * (torch.arange(v_null.shape[1]) < 3).view(-1, 1, 1)>>
DiT: guidance at all times | cfg != 1<< and interval[0] <= level <= interval[1] => >>\n
DiT: guided by class 0 | torch.full_like(y, <<-1 => 0>>)])
VA-VAE: variance for std | <<(logvar.clamp(-30, 20) / 2) => logvar.clamp(-30, 20)>>.exp()
VA-VAE: padded on the other side | nn.ZeroPad2d((<<0, 1, 0, 1 => 1, 0, 1, 0>>))
latents: not divided by the std | <<((torch.cat(z) - mean) / std) => (torch.cat(z) - mean)>>.half()
latents: mirror image where none is asked for | <<x0, mirrored => mirrored, x0>> = images.float().unbind(1)
latents: mean of the posterior | <<(mean + std * noise) => mean>>.unflatten
latents: mirror image not mirrored | torch.stack([images, images<<.flip(3) => >>], dim=1)
latents: statistics of the test split | << => samples = list_images(root, "test")[0]\n        >>chosen = np.random
latents: statistics of the first images | chosen = <<np.random.RandomState(0).permutation => range>>(len(samples))
latents: decoded as they are | net.decode(piece<< * std + mean => >>)
latents: a begun cache goes on with other classes | if (n<<, classes => >>) != (meta[split]<<, meta["classes"] => >>):
latents: another VA-VAE in the run's place | if <<args.latents and meta["vae"] != args.latents["vae"] => False>>:
latents: always the first shard | self.parts[<<row // SHARD => 0>>]
""",
    "sample.py": r"""
trained weights instead of EMA |
    (<<state["ema"] => {k[4:]: v for k, v in state.get("objective", {}).items() if k[:4] == "net."} or state["ema"]>>)
loaded network in training mode | net.to(device)<<.eval() => >>.requires_grad_(False)
no warning of an edited script | if <<state.get("script_hash", text_hash) != text_hash => False>>:
--script counts before the three scripts | if name in SCRIPTS<< =>  and file is None>>:
code is run that a checkpoint names | if <<name in SCRIPTS => file is None>>:
NaN samples written | if <<not torch.isfinite(x0).all() => False>>:
noise does not depend on --seed | default_rng(<<(seed, index) => index>>)
samples without labels | noise, <<y=y, **options => **options>>)
labels of the first piece | None if y is None else y[<<rows => : len(x[rows])>>]
labels begin anew in every block | [labels[i % len(labels)] for i in <<indices => range(len(indices))>>]
random labels do not depend on --seed | default_rng((<<seed => 0>>, i, 1))
labels: a number counts before a name | if word in names<< =>  and not word.isdecimal()>>:
--steps ignored | "seed", <<"steps", => >> "batch"
NFE counts pieces | << => self.evaluations += first > 0\n                >>outputs.append(net(
ranks draw the same blocks | range(<<rank * BLOCK => 0>>, n, world * BLOCK)
parts: all rows are the first's | f"<<{row} => 0>>_{i}").read_bytes()
parts: joined in the order of their names | for i in <<range(0, n, BLOCK) => sorted(range(0, n, BLOCK), key=str)>>)
images transposed | images.permute(0, <<2, 3 => 3, 2>>, 1)
npz in Fortran's order | "fortran_order": <<False => True>>
grid: columns of other classes named |
    one_class = drawn > 0<< and all(other.args.classes == model.args.classes for other in models) => >>
grid: unconditional rows under class names | if not one_class<< or not all(other.net.classes for other in models) => >>:
grid: 8 images whatever the classes | n, one_class = n or 8<< * drawn => >>, True
grid: columns for classes that are not drawn | columns = <<min(n, drawn) => drawn>>
""",
    "probe.py": r"""
probe shows class labels |
    noise, y=<<None => torch.zeros(len(x0)).long() if self.model.net.classes else None>>, pool=self.pool
probe takes the last checkpoint |
    best = <<max(results, key=lambda result: best_cell(result["cells"])["linear"]) => results[-1]>>
probe counts raw pixels | <<(cell["level"] is not None, cell["linear"]) => cell["linear"]>>)
probe repeats its noise | args.seed, FRESH_NOISE, <<epoch => 0>>)
probe's epochs on CIFAR | <<15 if args.dataset in ("cifar10", "cifar100") else 30 => 30>>
probe's lr on latents | <<2e-3 if latents else 4e-3 => 4e-3>>
probe's batch of ddpm | BATCHES = {"ddpm": <<512 => 256>>
probe's layer | args.layer or [<<model.args.layer => list(feats)[-1]>>]
probe stops at the layer named last | <<max(self.widths, key=self.model.net.layers.index) => [*self.widths][-1]>>
subset with labels of others | images[chosen], labels[<<chosen => : len(chosen)>>]
probe tests on the training split | "train", device), load_split(model, args, "<<test => train>>", device)
probe flips the test images | compute_features(encode, test, TEST_NOISE, args.seed<< => , flip=True>>)
probe ignores --no-flip | flip_probability = <<0.5 if args.flip else 0.0 => 0.5>>
probe's lr stays | args.lr<< * (1 + math.cos(math.pi * progress)) / 2 => >>
probe's cache without flips | torch.where(flip[index, None], <<mirrored => plain>>[index]
probe's cache: mirror images not mirrored | MIRRORED_NOISE, args.seed<<, flip=True => >>)
probe's cache: one noise for all blocks | stream_generator(device, seed, stream, <<block => 0>>)
noise streams: test images have the training images' | compute_features(encode, test, <<TEST => TRAIN>>_NOISE
noise streams: mirror images have the images' | compute_features(encode, train, <<MIRRORED => TRAIN>>_NOISE
shares: every rank takes the first | batch.tensor_split(world)[<<rank => 0>>]
shares: noise of the first rank | noise.tensor_split(world)[<<rank => 0>>]
shares: each rank's own mean | loss = losses / len(<<batch => index>>)
gradients of one rank | <<all_reduce(parameter.grad) => pass>>
probe standardises by the test split | mean, std = <<bank.mean(0), (bank => test_feat.mean(0), (test_feat>>.var(
probe drops the last batch | order<< => [: max(args.batch, n - n % args.batch)]>>.split(args.batch)
standard error: standard deviation | math.sqrt(accuracy * (100 - accuracy)<< / n => >>)
kNN votes unweighted | weight = <<(similarity / KNN_TEMPERATURE).exp() => torch.ones_like(similarity)>>
held-out loss on the training split | load_split(model, args, "<<test => train>>", device)\n    args = fill
held-out loss with EDM's learned weight | <<_, unweighted, _ => unweighted, _, _>> = model.diffusion.loss
held-out loss: one noise for all images | round(1e6 * level), <<index => 0>>)
held-out loss: spread for standard error | ddof=1)<< / len(blocks) ** 0.5 => >>)
held-out loss of two formulations paired | kinds.add((<<type(model.diffusion).__name__ => model.args.model>>,
baseline: difference to the last | baseline = results[<<0 => -1>>]
baseline: differences not paired | np.array(baseline["blocks"])<< => .mean(1, keepdims=True)>>
map: axis of the first | first = <<group[0] => results[0]>>\n        ticks
map: columns in the order of layers | <<values, (-1, len(first["layers"]))).T => values, (len(first["layers"]), -1))>>
FID figure: epochs in the order of files | in <<sorted(epochs.items()) => epochs.items()>>:
curves: one batch for the whole log | images_seen += (row["step"] - step) * <<flags["batch"] => 8>>
curves: weighted loss | float(row["loss<<_unweighted => >>"])
curves: each run a window of its own | round(<<window * len(images) / images[-1] => len(images) / 20>>))
curves: nothing is left of a short run | start = <<min(2 * n, len(images) - n) => 2 * n>>
names: --json does not name the picture | <<args.json.with_suffix(".png") if args.json else folder => folder>>
names: several checkpoints leave no numbers | and (<<several or has_figure => has_figure>>)
names: comparisons overwrite each other | if <<several and not args.paths_are_json => False>>:
names: checkpoints of a run overwrite each other | elif <<path.suffix == ".pt" and path.stem != "last" => False>>:
names: in the folder of the first argument | folder = folder<<.parent => >>\n    has
""",
    "fid.py": r"""
FID against the test split | script.load_data(flags, "<<train => test>>")
FID: covariance over n | torch.outer(mean, mean)) / <<(n - 1) => n>>
FID: Inception in training mode | channels_last).<<eval(). => >>requires_grad_(False)
FID: sampling flags dropped | generate(model, args.n, rank, world<<, **options => >>)
FID: resize aligns corners | align_corners=<<False => True>>) - 1
FID: resize with antialiasing | mode="bilinear", << => antialias=True, >>align_corners
Inception: padding averaged | count_include_pad=<<False => True>>
Inception: bias in the logits | self.fc.weight.double().T<< =>  + self.fc.bias.double()>>\n
Inception: average in the last block | partial(F.<<max => avg>>_pool2d, kernel
weights: hash not checked | WEIGHTS_URL, path<<, hash_prefix=WEIGHTS_SHA => >>)
weights: downloaded by every rank | if <<rank == 0 and not path => not path>>.is_file():
IS: images in their order | np.<<random.RandomState(2020).permutation => arange>>(n)
IS: every block in the first splits | split_of_image[<<indices.start : indices.stop => : len(indices)>>]
IS: splits are strided | split[order[<<s * n // splits : (s + 1) * n // splits => s::splits>>]]
IS: std over n - 1 | scores.std(<<correction=0 => >>)
FID: ranks not summed | <<dist.all_reduce(value) => pass>>
FID: the highest of several | lowest = <<min => max>>(results
FID: only the last of several is written | {"results": results<< => [-1:]>>, "resolution"
FID: all scored as the first | sums = measure(net, <<images => first_images>>, args.batch, rank, world)
FID: reference of other pixels is used | <<_{pixel_hash} => >>_{net.sha}.npz
FID: reference of other weights is used | _{pixel_hash}<<_{net.sha} => >>.npz
FID: --n ignored for npz | torch.from_numpy(array<<[:n] => >>)
folders: images in the order of the disk | files = <<sorted(files) => files>>[:n]
PNG: transparent ones are taken | not in ("RGB", "L", "P")<< or image.has_transparency_data => >>:
PNG: 16 bits are taken | if image.mode not in ("RGB", "L", "P"<< => , "I;16">>)
--ref: a data set is taken for images | return path.is_dir()<< and not (path / "train").is_dir() => >>\n
--ref: an npz in this folder is a data set | if <<path.suffix.lower() == ".npz" or "/" => "/">> in name:
--ref: a folder in this folder is a data set | return <<path.is_dir() and => False and>> not (path / "train")
""",
}

def mutants():
    """Every mutant as (file, name, old text, new text)."""
    for target, table in MUTANTS.items():
        for name, text in re.findall(r"^(\S.*?) \|\s+(.+)$", table, re.MULTILINE):
            text = text.replace(r"\n", "\n")
            yield target, name, *(re.sub(r"<<(.*?) => (.*?)>>", side, text, flags=re.DOTALL) for side in (r"\1", r"\2"))

def mutate(folder, target, old, new):
    """The changed files, {path: text}. Raises ValueError or SyntaxError where the mutant is stale."""
    texts = {path: path.read_text() for path in folder.glob(target)}
    texts = {path: text for path, text in texts.items() if old in text}
    if not texts:
        raise ValueError("not found")
    for path, text in texts.items():
        if text.count(old) > 1:
            raise ValueError(f"{text.count(old)} times in {path.name}")
        texts[path] = text.replace(old, new)
        compile(texts[path], path.name, "exec")
    return texts

def run_tests(tree, target, limit, quick):
    """The first test that fails, "" if none does: quick tests of the likely files, of the others, then slow ones."""
    names = {path.stem.removeprefix("test_") for path in tree.glob("tests/test_*.py")} - {"repo"}
    places = {name: place for place, name in enumerate(LIKELY)}
    names = sorted(names, key=lambda name: (f"{name}.py" not in target, places.get(name, len(LIKELY)), name))
    files = [f"tests/test_{name}.py" for name in names]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for marker in ["not slow"] if quick else ["not slow", "slow"]:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", marker]
        command += ["--basetemp", str(tree / "tmp"), *files]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        tests = subprocess.Popen(command, cwd=tree, env=env, start_new_session=True, **pipes)
        try:
            said, _ = tests.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # the tests and the processes that they started
            tests.communicate()
            return f"no end in {limit} s"
        if tests.returncode not in (0, NO_TESTS):
            failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", said, re.MULTILINE)
            return failed[0] if failed else said.strip().splitlines()[-1]
    return ""

def judge(target, name, old, new, limit, quick):
    """Verdict, and the first failing test or what is wrong with the mutant; old "" is the repository as it is."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "data", "__pycache__"))
        try:
            for path, text in mutate(tree, target, old, new).items() if old else ():
                path.write_text(text)
        except (ValueError, SyntaxError) as error:
            return "INVALID", str(error)
        failed = run_tests(tree, target, limit, quick)
    return ("caught" if failed else "SURVIVED"), failed

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument("--only", default="", help="regular expression for names, or files' names")
    parser.add_argument("--shuffle", type=int, metavar="N", help="only N at random, with a fixed seed")
    parser.add_argument("--limit", type=int, default=900, help="seconds, for quick and slow tests each (default: 900)")
    parser.add_argument("--quick", action="store_true", help="without the slow tests")
    parser.add_argument("--check", action="store_true", help="only see whether the texts are still there")
    args = parser.parse_args()
    todo = [mutant for mutant in mutants() if re.search(args.only, f"{mutant[1]} {mutant[0]}")]
    if args.shuffle:
        todo = random.Random(0).sample(todo, min(args.shuffle, len(todo)))
    if args.check:
        for target, name, old, new in todo:
            try:
                mutate(ROOT, target, old, new)
            except (ValueError, SyntaxError) as error:
                print(f"{target:14} {name}: {error}")
        print(f"{len(todo)} mutants")
        return
    counts = {"caught": 0, "SURVIVED": 0, "INVALID": 0}
    with ThreadPoolExecutor(args.jobs) as pool:
        plain = pool.submit(judge, "train_*.py", "", "", "", args.limit, args.quick)
        futures = [pool.submit(judge, *mutant, args.limit, args.quick) for mutant in todo]
        for (target, name, _, _), future in zip(todo, futures, strict=True):
            if plain.done() and plain.result()[1]:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"the tests fail without any mutant, first {plain.result()[1]}")
            verdict, failed = future.result()
            counts[verdict] += 1
            print(f"{verdict:9} {target:14} {name:52} {failed}", flush=True)
    if plain.result()[1]:
        sys.exit(f"nothing of this counts: the tests fail without any mutant, first {plain.result()[1]}")
    print(f"{counts['caught']} of {len(todo)} caught, {100 * counts['caught'] / max(1, len(todo)):.1f} %; "
          f"{counts['SURVIVED']} survived, {counts['INVALID']} invalid")

if __name__ == "__main__":
    main()
