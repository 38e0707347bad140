"""Twelve silent bugs, for the teacher: texts to replace, the test that notices, what curves show.

`make.py bug` plants them. With each of them, training runs to its end and prints no warning.
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
        curve="",
    ),
    "target_shape": Bug(
        changes={".amin(-1) - alpha * log_prob": ".amin(-1, keepdim=True) - alpha * log_prob"},
        test="test_critic_loss_by_hand",
        curve="",
    ),
    "no_entropy": Bug(
        changes={".amin(-1) - alpha * log_prob": ".amin(-1)"},
        test="test_critic_loss_by_hand",
        curve="",
    ),
    "no_residual": Bug(
        changes={"x = x + adapter(x, omega)": "x = adapter(x, omega)"},
        test="test_network_adds_the_adapter_to_x_before_the_relu",
        curve="",
    ),
    "no_reset": Bug(
        changes={
            "                self.step(random)\n        self.reset()\n": (
                "                self.step(random)\n"
            ),
        },
        test="test_rollout_warms_up_for_K_steps_and_then_resets",
        curve="",
    ),
    "norm_axis": Bug(
        changes={"groups.softmax(-1)": "groups.softmax(-2)"},
        test="test_sim_norm_by_hand",
        curve="",
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
        curve="",
    ),
    "scaled_masks": Bug(
        changes={", a * keep_a, ds * keep_ds], -1)": ", a * keep_a, ds * keep_ds], -1) / (1 - p)"},
        test="test_mask_inputs_does_not_scale_what_is_left",
        curve="",
    ),
    "time_limit": Bug(
        changes={
            "    @property\n    def s2(self):\n": (
                "    done: torch.Tensor | float = 0.0  # (B,)\n\n    @property\n    def s2(self):\n"
            ),
            "batch.r + gamma * v2": "batch.r + gamma * (1 - batch.done) * v2",
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
        curve="",
    ),
    "masks_on": Bug(
        changes={
            "if noisy:\n            tau = mask": "if self.mask > 0:\n            tau = mask",
        },
        test="test_encoder_masks_at_the_rate_of_its_method_and_only_if_noisy",
        curve="",
    ),
    "windows_cross": Bug(
        changes={
            "past = (t.unsqueeze(-1) - self.K + i) % self.capacity\n": (
                "past = ((t * self.N + n).unsqueeze(-1) - self.K + i) % (self.capacity * self.N)\n"
            ),
            "self.rows[past, n.unsqueeze(-1), :-1]": "self.rows.flatten(0, 1)[past, :-1]",
        },
        test="test_windows_hold_past_transitions_of_their_own_context",
        curve="",
    ),
    "target_rate": Bug(
        changes={"self.Q, self.cfg.polyak)": "self.Q, 1 - self.cfg.polyak)"},
        test="test_update_moves_the_target_critics_by_rho",
        curve="",
    ),
}
