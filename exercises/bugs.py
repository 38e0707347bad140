"""Twelve silent bugs, for the teacher: texts to replace, the test that notices, what curves show.

`make.py bug` plants them. With each of them, training runs to its end and prints no warning.

The curves are of this run, a minute on one thread, with seed 1 alone. A difference of a few points
of return therefore says nothing:

    python dmash.py --env point:point --quick --contexts 8 --batch 64 --hidden 64 --bottleneck 8 \
        --random-steps 1000 --steps 1500 --eval-every 250 --rollouts 1 --threads 1

Sound code: the columns of metrics.csv after 750, 1,000, 1,250 and 1,500 steps.

    train            15      35      46      45
    eval_out         15      33      43      42
    dynamics_loss    2.9e-3  1.2e-3  1.1e-3  1.0e-3
    critic_loss      1.6     1.5     1.1     0.8
    alpha            0.043   0.037   0.042   0.049
"""

from typing import NamedTuple


class Bug(NamedTuple):
    """A bug. In dmash.py, each old text stands exactly once."""

    changes: dict  # old text: new text
    test: str  # of test_dmash.py
    curve: str  # what a student sees


BUGS = {
    "window_late": Bug(
        changes={
            "past = (t.unsqueeze(-1) - self.K + i)": "past = (t.unsqueeze(-1) - self.K + i + 1)",
        },
        test="test_windows_hold_past_transitions_of_their_own_context",
        curve=(
            "train 14 29 43 41, the losses as in sound code: nothing to see. The target is one of "
            "K transitions, which is read in one of five samples and masked in two of five."
        ),
    ),
    "target_shape": Bug(
        changes={".amin(-1) - alpha * log_prob": ".amin(-1, keepdim=True) - alpha * log_prob"},
        test="test_critic_loss_by_hand",
        curve=(
            "train 16 16 33 40: late by 300 steps. critic_loss stays near 9, six times that of "
            "sound code and more, since it is a sum over the batch. alpha falls to 0.019."
        ),
    ),
    "no_entropy": Bug(
        changes={".amin(-1) - alpha * log_prob": ".amin(-1)"},
        test="test_critic_loss_by_hand",
        curve=(
            "train 16 25 43 44, the losses as in sound code: nothing to see. alpha is 0.04, so "
            "the entropy is a small part of the target."
        ),
    ),
    "no_residual": Bug(
        changes={"x = x + adapter(x, omega)": "x = adapter(x, omega)"},
        test="test_network_adds_the_adapter_to_x_before_the_relu",
        curve=(
            "train 22 44 43 45: as good, and sooner, on so easy a task. critic_loss is half of "
            "that of sound code: 0.4 at the end."
        ),
    ),
    "no_reset": Bug(
        changes={
            "                self.step(random)\n        self.reset()\n": (
                "                self.step(random)\n"
            ),
        },
        test="test_rollout_warms_up_for_K_steps_and_then_resets",
        curve=(
            "train 12 26 29 26. It looks like bad learning, but the losses are those of sound "
            "code: the first 20 of 50 steps are the warm-up, and their reward is not counted."
        ),
    ),
    "norm_axis": Bug(
        changes={"groups.softmax(-1)": "groups.softmax(-2)"},
        test="test_sim_norm_by_hand",
        curve=(
            "train 27 44 43 44: as good, and sooner. Pairs of numbers of z now sum to one, and "
            "that is enough for one sign."
        ),
    ),
    "stop_gradient": Bug(  # one line too late; without it, update fails (grade 1, step 9)
        changes={
            '            loss.backward()\n            optimizers["dynamics"].step()\n': (
                "            loss.backward(retain_graph=True)\n"
            ),
            "        omega = omega.detach()\n": "",
            '        optimizers["critic"].step()\n': (
                '        optimizers["critic"].step()\n'
                "        if self.f is not None:\n"
                '            optimizers["dynamics"].step()\n'
                "        omega = omega.detach()\n"
            ),
        },
        test="test_gradient_routing",
        curve=(
            "train 12 16 22 16. dynamics_loss stays at 3.0e-3, and critic_loss grows to 23: the "
            "critics' gradient moves encoder and hypernetwork, too."
        ),
    ),
    "scaled_masks": Bug(
        changes={", a * keep_a, ds * keep_ds], -1)": ", a * keep_a, ds * keep_ds], -1) / (1 - p)"},
        test="test_mask_inputs_does_not_scale_what_is_left",
        curve=(
            "train 14 33 42 44, the losses as in sound code: nothing to see. The embedding has no "
            "bias, so AvgL1Norm takes the factor out again. It counts in the method "
            "no_input_norm."
        ),
    ),
    "time_limit": Bug(
        changes={
            ", the true contexts, which Concat and DA read\n": (
                ", the true contexts, which Concat and DA read\n"
                "    done: torch.Tensor | float = 0.0  # (B,)\n"
            ),
            "batch.r + gamma * v2  # no (1 − done): a time limit is no terminal state": (
                "batch.r + gamma * (1 - batch.done) * v2"
            ),
            "        self.t = 0  # transitions": (
                "        self.ends = torch.zeros(capacity, device=c.device)\n"
                "        self.t = 0  # transitions"
            ),
            "    def add(self, s, a, r, s2):\n": ("    def add(self, s, a, r, s2, done=False):\n"),
            "        self.t += 1\n": (
                "        self.ends[self.t % self.capacity] = float(done)\n        self.t += 1\n"
            ),
            "        return Batch(s, a, ds, r.squeeze(-1), self.windows(n, t, noisy=True), ": (
                "        tau, done = self.windows(n, t, noisy=True), self.ends[t % self.capacity]\n"
                "        return Batch(s, a, ds, r.squeeze(-1), tau, done=done, c="
            ),
            "self.replay.add(s, a, r, self.s)": "self.replay.add(s, a, r, self.s, self.done)",
        },
        test="test_critic_loss_bootstraps_at_the_time_limit",
        curve=(
            "train 13 34 44 41: hardly to see in the returns. critic_loss is: 2.9 4.0 7.2 12.6, "
            "and it grows, since one target in 70 is near 0 among values that grow."
        ),
    ),
    "masks_on": Bug(
        changes={
            "if noisy:\n            tau = mask": "if self.mask > 0:\n            tau = mask",
        },
        test="test_encoder_masks_at_the_rate_of_its_method_and_only_if_noisy",
        curve=(
            "train 17 33 40 43, the losses as in sound code. eval_out ends at 38 instead of 42. "
            "The same window gives another z each time: that is the way to find it."
        ),
    ),
    "windows_cross": Bug(
        changes={
            "past = (t.unsqueeze(-1) - self.K + i) % self.capacity\n": (
                "past = ((t * self.N + n).unsqueeze(-1) - self.K + i) % (self.capacity * self.N)\n"
            ),
            "self.rows[past, n.unsqueeze(-1), :-1]": "self.rows.flatten(0, 1)[past, :-1]",
        },
        test="test_windows_hold_past_transitions_of_their_own_context",
        curve=(
            "train 13 14 17 18. dynamics_loss stays at 2.9e-3, nearly that of no window: a window "
            "holds K / 8 transitions of its context, and those of all others."
        ),
    ),
    "target_rate": Bug(
        changes={"self.Q, self.cfg.polyak)": "self.Q, 1 - self.cfg.polyak)"},
        test="test_update_moves_the_target_critics_by_rho",
        curve=(
            "train 14 19 21 20. critic_loss is in the hundreds, and alpha grows to 0.45: the "
            "critics chase themselves."
        ),
    ),
}
