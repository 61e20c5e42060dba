"""Portable model ops against formulas in fp64 and against transformers, in bf16 and fp32.

Where a bound is given, it counts roundings: u = 2^-24 each in fp32, and one of 2^-8 where the result is bf16.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
    DeepseekV4UnweightedRMSNorm,
    apply_rotary_pos_emb,
)

from sglang_dsv4.errors import UnsupportedError
from sglang_dsv4.plugin.install.portable import model_ops

U = 2.0**-24
ROUNDING = {torch.float32: U, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
LIMIT = 10.0
EPS = 1e-6


def within(found, exact, bound):
    assert found.shape == exact.shape
    return bool(((found.double() - exact).abs() <= bound).all())


def frequencies(num_positions=4096, rope_dim=64):
    angles = torch.outer(torch.arange(num_positions).float(), 10000.0 ** (-torch.arange(0, rope_dim, 2) / rope_dim))
    return torch.polar(torch.ones_like(angles), angles)


def turned(x, freqs_cis, positions, inverse=False):
    """RoPE of ``[T, H, R]`` in fp64, as a complex product."""
    turn = freqs_cis[positions.long()].to(torch.complex128).unsqueeze(1)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * (turn.conj() if inverse else turn)).flatten(-2)


def pair_sizes(x):
    return x.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)


class TestQNormRope:
    # The norm's sum by halving, root, quotient and products: 16 roundings; the rotation: 3.
    BOUND = (16 + 3) * U

    def exact(self, q, freqs_cis, positions, eps=EPS):
        y = q.double() / (q.double().square().mean(-1, keepdim=True) + eps).sqrt()
        return torch.cat([y[..., :-64], turned(y[..., -64:], freqs_cis, positions)], dim=-1)

    def bound(self, exact, dtype):
        return self.BOUND * pair_sizes(exact) + ROUNDING[dtype] * exact.abs()

    @DTYPES
    @pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
    def test_matches_fp64(self, dtype, position_dtype):
        q, freqs = torch.randn(7, 8, 512).to(dtype), frequencies()
        positions = torch.tensor([0, 1, 127, 128, 255, 256, 4095], dtype=position_dtype)
        out = torch.full_like(q, float("nan"))
        model_ops.q_norm_rope(q, out, EPS, freqs, positions)
        exact = self.exact(q, freqs, positions)
        assert within(out, exact, self.bound(exact, dtype))
        for wrong in (
            self.exact(q, freqs, (positions + 1) % 4096),
            self.exact(q, freqs.conj(), positions),
            self.exact(q, freqs, positions, eps=0.05),
        ):
            assert not within(out, wrong, self.bound(exact, dtype))

    @DTYPES
    def test_reads_and_writes_strided_tensors(self, dtype):
        wide, freqs, positions = torch.randn(5, 12, 1024).to(dtype), frequencies(), torch.arange(5)
        q = wide[:, 2:10, 256:768]
        padded = torch.zeros(5, 64, 512, dtype=dtype)
        model_ops.q_norm_rope(q, padded[:, 3:11], EPS, freqs, positions)
        alone = torch.empty(5, 8, 512, dtype=dtype)
        model_ops.q_norm_rope(q.contiguous(), alone, EPS, freqs, positions)
        assert torch.equal(padded[:, 3:11], alone)
        assert padded[:, :3].count_nonzero() == 0 and padded[:, 11:].count_nonzero() == 0

    @DTYPES
    def test_no_tokens(self, dtype):
        q = torch.empty(0, 8, 512, dtype=dtype)
        model_ops.q_norm_rope(q, q, EPS, frequencies(), torch.empty(0, dtype=torch.int64))

    def test_matches_transformers(self):
        q, freqs, positions = torch.randn(9, 8, 512), frequencies(), torch.arange(100, 109)
        out = torch.empty_like(q)
        model_ops.q_norm_rope(q, out, EPS, freqs, positions)
        normed = DeepseekV4UnweightedRMSNorm(EPS)(q)
        theirs = apply_rotary_pos_emb(normed, freqs.real[positions], freqs.imag[positions])
        assert within(out, theirs.double(), 2 * self.bound(theirs, torch.float32))
        assert not within(out, normed.double(), 2 * self.bound(theirs, torch.float32))


class TestRopeInplace:
    @DTYPES
    @pytest.mark.parametrize("inverse", [False, True])
    def test_matches_fp64_and_leaves_the_rest_alone(self, dtype, inverse):
        rows, freqs = torch.randn(6, 8, 512).to(dtype), frequencies()
        positions = torch.tensor([0, 3, 4, 127, 128, 2000], dtype=torch.int32)
        exact = turned(rows[..., -64:], freqs, positions, inverse)
        bound = 3 * U * pair_sizes(exact) + ROUNDING[dtype] * exact.abs()
        out = rows.clone()
        model_ops.rope_inplace(out[..., -64:], None, freqs, positions=positions, inverse=inverse)
        assert within(out[..., -64:], exact, bound)
        assert not within(out[..., -64:], turned(rows[..., -64:], freqs, positions, not inverse), bound)
        assert torch.equal(out[..., :-64], rows[..., :-64])

    def test_rotates_keys_as_well(self):
        q, k, freqs, positions = (torch.randn(4, 3, 64), torch.randn(4, 1, 64), frequencies(), torch.arange(4))
        expected = k.clone()
        model_ops.rope_inplace(expected, None, freqs, positions)
        model_ops.rope_inplace(q, k, freqs, positions)
        assert torch.equal(k, expected)

    def test_no_tokens(self):
        model_ops.rope_inplace(torch.empty(0, 8, 64), None, frequencies(), torch.empty(0, dtype=torch.int32))


class TestSiluAndMulClamp:
    # exp and its argument, the sum, the quotient, the product, each to 2 units.
    BOUND = 8 * U

    def exact(self, gate_up, gate_limit=LIMIT, up_limit=LIMIT):
        gate, up = gate_up.double().chunk(2, dim=-1)
        gate, up = gate.clamp(max=gate_limit), up.clamp(-up_limit, up_limit)
        return gate / (1 + (-gate).exp()) * up

    @DTYPES
    @pytest.mark.parametrize("num_tokens", [0, 1, 33])
    def test_matches_fp64(self, dtype, num_tokens):
        gate_up = (8 * torch.randn(num_tokens, 512)).to(dtype)[:, 64:448]
        out = torch.full((num_tokens, 192), float("nan"), dtype=dtype)
        model_ops.silu_and_mul_clamp(gate_up, out, LIMIT)
        exact = self.exact(gate_up)
        bound = (self.BOUND + ROUNDING[dtype]) * exact.abs()
        assert within(out, exact, bound)
        if num_tokens:
            assert not within(out, self.exact(gate_up, gate_limit=1e9), bound)
            assert not within(out, self.exact(gate_up, up_limit=1e9), bound)

    def test_no_limit(self):
        gate_up = 8 * torch.randn(5, 64)
        exact = self.exact(gate_up, 1e9, 1e9)
        assert within(model_ops.clamped_swiglu(gate_up, None), exact, self.BOUND * exact.abs())


def hyper_config(hidden=64, streams=4):
    return DeepseekV4Config(
        hidden_size=hidden, hc_mult=streams, hc_sinkhorn_iters=20, hc_eps=EPS, rms_norm_eps=EPS, num_hidden_layers=1
    )


class TestHcSplitSinkhorn:
    N = 4

    def inputs(self, shape=(3, 5)):
        mixes = 2 * torch.randn(*shape, (2 + self.N) * self.N)
        return mixes, torch.rand(3) + 0.5, torch.randn((2 + self.N) * self.N)

    def exact(self, mixes, scale, base, iters=20):
        n, z = self.N, mixes.double()
        scale, base = scale.double(), base.double()
        pre = torch.sigmoid(z[..., :n] * scale[0] + base[:n]) + EPS
        post = 2 * torch.sigmoid(z[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        matrix = (z[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + EPS
        for i in range(2 * iters - 1):
            matrix = matrix / (matrix.sum(-2 if i % 2 == 0 else -1, keepdim=True) + EPS)
        return pre, post, matrix

    def bound(self, iters=20):
        # Each normalisation: four additions and a quotient. Before: logits up to 32, rounded twice, in an exponential.
        return (2 * iters * 5 + 2 * 32 + 8) * U

    @pytest.mark.parametrize("iters", [1, 2, 20])
    @pytest.mark.parametrize("shape", [(3, 5), (7, 1), (0, 1)])
    def test_matches_fp64(self, iters, shape):
        given = self.inputs(shape)
        found = model_ops.hc_split_sinkhorn(*given, self.N, iters, EPS)
        exact = self.exact(*given, iters=iters)
        assert [tuple(part.shape) for part in found] == [(*shape, 4), (*shape, 4), (*shape, 4, 4)]
        for ours, theirs in zip(found, exact, strict=True):
            assert within(ours, theirs, self.bound(iters) * theirs)
        if 0 not in shape:
            assert not within(found[2].mT, exact[2], self.bound(iters) * exact[2])
            if iters < 20:  # 20 have converged
                more = self.exact(*given, iters=iters + 1)[2]
                assert not within(found[2], more, self.bound(iters) * more)

    def test_matches_transformers(self):
        torch.manual_seed(1)
        theirs = DeepseekV4HyperConnection(hyper_config())
        streams = torch.randn(2, 3, 4, 64)
        with torch.no_grad():
            theirs.fn.normal_(std=0.1), theirs.base.normal_(), theirs.scale.uniform_(0.5, 1.5)
            flat = streams.flatten(2)
            mixes = linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS), theirs.fn)
            post, comb, collapsed = theirs(streams)
            pre, our_post, our_comb = model_ops.hc_split_sinkhorn(mixes, theirs.scale, theirs.base, 4, 20, EPS)
        # Both are in fp32, so twice the bound.
        bound = 2 * self.bound()
        assert within(our_post, post.double(), bound * post) and within(our_comb, comb.double(), bound * comb)
        ours = (pre.unsqueeze(-1) * streams).sum(2)
        assert within(ours, collapsed.double(), bound * (pre.unsqueeze(-1) * streams).abs().sum(2))
        assert not within(our_comb.mT, comb.double(), bound * comb)


class TestHcHead:
    def inputs(self, num_tokens, dtype):
        x = torch.randn(num_tokens, 4, 64).to(dtype)
        return x, 0.2 * torch.randn(4, 256), torch.tensor([0.7]), torch.randn(4)

    def exact(self, x, fn, scale, base):
        """The result, and a bound on the error of fp32: sums of 256 products, a sigmoid of slope 1/4, a sum of 4."""
        x, fn = x.double(), fn.double()
        flat = x.flatten(1)
        norm = 1 / (flat.square().mean(-1, keepdim=True) + EPS).sqrt()
        weights = torch.sigmoid(flat @ fn.T * norm * scale + base) + EPS
        logit_error = (256 + 16) * U * (flat.abs() @ fn.abs().T * norm * scale + base.abs())
        bound = ((logit_error / 4 + 8 * U * weights).unsqueeze(-1) * x.abs()).sum(1)
        return (weights.unsqueeze(-1) * x).sum(1), bound

    @DTYPES
    @pytest.mark.parametrize("num_tokens", [0, 1, 17])
    def test_matches_fp64(self, dtype, num_tokens):
        given = self.inputs(num_tokens, dtype)
        exact, bound = self.exact(*given)
        found = model_ops.hc_head(*given, EPS, EPS)
        assert found.dtype == dtype
        bound = bound + ROUNDING[dtype] * exact.abs()
        assert within(found, exact, bound)
        if num_tokens:
            x, fn, scale, base = given
            assert not within(found, self.exact(x, fn, scale, base.flip(0))[0], bound)
            assert not within(found, self.exact(x.flip(1), fn, scale, base)[0], bound)

    def test_takes_strided_streams(self):
        x, *rest = self.inputs(6, torch.float32)
        wide = torch.zeros(6, 4, 128)
        wide[..., 32:96] = x
        assert torch.equal(model_ops.hc_head(wide[..., 32:96], *rest, EPS, EPS), model_ops.hc_head(x, *rest, EPS, EPS))

    def test_matches_transformers(self):
        x, fn, scale, base = self.inputs(9, torch.float32)
        theirs = DeepseekV4HyperHead(hyper_config())
        with torch.no_grad():
            theirs.hc_fn.copy_(fn), theirs.hc_scale.copy_(scale), theirs.hc_base.copy_(base)
            expected = theirs(x.unsqueeze(0))[0]
        assert within(model_ops.hc_head(x, fn, scale, base, EPS, EPS), expected.double(), 2 * self.exact(x, fn, scale, base)[1])


class TestRouterLogits:
    @DTYPES
    @pytest.mark.parametrize("num_tokens", [0, 1, 40])
    def test_is_fp32_and_matches_fp64(self, dtype, num_tokens):
        x, gate = (torch.randn(num_tokens, 256).to(dtype), SimpleNamespace(weight=torch.randn(8, 256).to(dtype)))
        found = model_ops.router_logits(gate, x)
        exact = x.double() @ gate.weight.double().T
        bound = 256 * U * (x.double().abs() @ gate.weight.double().abs().T)
        assert found.dtype == torch.float32 and within(found, exact, bound)
        if num_tokens:
            assert not within(found.bfloat16(), exact, bound)


def moe_config(**changes):
    values = {"activation": "silu", "gemm1_alpha": None, "apply_router_weight_on_input": False, "swiglu_limit": LIMIT}
    return SimpleNamespace(**{**values, **changes})


class TestRoutedExperts:
    E, D, I, K = 8, 64, 32, 2

    def inputs(self, num_tokens, dtype):
        # Large enough that the limit is reached.
        layer = SimpleNamespace(
            w13_weight=(0.7 * torch.randn(self.E, 2 * self.I, self.D)).to(dtype),
            w2_weight=(0.2 * torch.randn(self.E, self.D, self.I)).to(dtype),
        )
        x = torch.randn(num_tokens, self.D).to(dtype)
        ids = torch.stack([torch.randperm(self.E)[: self.K] for _ in range(num_tokens)]) if num_tokens else torch.empty(0, 2)
        return layer, x, torch.rand(num_tokens, self.K), ids.long()

    def token_by_token(self, layer, x, weights, ids, limit=LIMIT):
        """The definition, in the dtype of its inputs."""
        rows = []
        for token in range(len(x)):
            row = torch.zeros(self.D, dtype=x.dtype)
            for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
                gate, up = (layer.w13_weight[expert] @ x[token]).chunk(2)
                row += weight.to(x.dtype) * (layer.w2_weight[expert] @ (silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)))
            rows.append(row)
        return torch.stack(rows)

    def wide(self, layer):
        return SimpleNamespace(w13_weight=layer.w13_weight.double(), w2_weight=layer.w2_weight.double())

    @DTYPES
    def test_is_at_most_twice_as_wrong_as_the_definition_in_the_same_dtype(self, dtype):
        layer, x, weights, ids = self.inputs(40, dtype)
        exact = self.token_by_token(self.wide(layer), x.double(), weights.double(), ids)
        plain = self.token_by_token(layer, x, weights, ids)
        allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()

        def error(layer, weights, ids, **changes):
            found = model_ops.routed_experts(layer, x, (weights, ids, None), moe_config(**changes))
            assert found.dtype == dtype
            return (found.double() - exact).abs().max()

        assert error(layer, weights, ids) <= allowed
        assert error(layer, weights, ids.int()) <= allowed
        assert error(layer, weights, ids, swiglu_limit=None) > allowed
        assert error(layer, weights.flip(1), ids) > allowed
        assert error(layer, weights, (ids + 1) % self.E) > allowed
        swapped = SimpleNamespace(w13_weight=layer.w13_weight.roll(self.I, 1), w2_weight=layer.w2_weight)
        assert error(swapped, weights, ids) > allowed

    def test_no_tokens_and_no_expert(self):
        layer, x, weights, ids = self.inputs(0, torch.float32)
        assert model_ops.routed_experts(layer, x, (weights, ids, None), moe_config()).shape == (0, self.D)
        layer, x, weights, _ = self.inputs(3, torch.float32)
        ids = torch.tensor([[0, 1], [2, 3], [4, 5]])  # none shared, so that no GEMM changes its shape below
        said = model_ops.routed_experts(layer, x, (weights, ids, None), moe_config())
        ids[1] = -1
        masked = model_ops.routed_experts(layer, x, (weights, ids, None), moe_config())
        assert masked[1].count_nonzero() == 0 and torch.equal(masked[0], said[0]) and torch.equal(masked[2], said[2])

    def test_matches_transformers(self):
        layer, x, weights, ids = self.inputs(20, torch.float32)
        config = DeepseekV4Config(
            hidden_size=self.D, moe_intermediate_size=self.I, n_routed_experts=self.E, swiglu_limit=LIMIT, num_hidden_layers=1
        )
        theirs = DeepseekV4Experts(config)
        with torch.no_grad():
            theirs.gate_up_proj.copy_(layer.w13_weight), theirs.down_proj.copy_(layer.w2_weight)
            expected = theirs(x, ids, weights)
        exact = self.token_by_token(self.wide(layer), x.double(), weights.double(), ids)
        found = model_ops.routed_experts(layer, x, (weights, ids, None), moe_config())
        allowed = 2 * (expected.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
        assert (found - exact).abs().max() <= allowed

    def test_refuses_other_experts(self):
        layer, x, weights, ids = self.inputs(1, torch.float32)
        with pytest.raises(UnsupportedError, match="activation silu.*got gelu"):
            model_ops.routed_experts(layer, x, (weights, ids, None), moe_config(activation="gelu"))
        layer.w13_weight_bias = torch.zeros(1)
        with pytest.raises(UnsupportedError, match="w13_weight_bias"):
            model_ops.routed_experts(layer, x, (weights, ids, None), moe_config())

    @pytest.mark.sglang
    def test_the_stock_one_leaves_out_the_limit(self, monkeypatch):
        """Why it is replaced; once this fails, the op may go."""
        from sglang.srt.layers.moe import fused_moe_native

        # Making SGLang's activation module takes a running server; this is the function that it would call.
        activation = partial(fused_moe_native.SiluAndMul.forward_native, None)
        monkeypatch.setattr(fused_moe_native, "SiluAndMul", lambda: activation)
        layer, x, weights, ids = self.inputs(20, torch.float32)
        layer.num_experts = self.E
        stock = fused_moe_native.moe_forward_native(layer, x, (weights, ids, None), moe_config())
        unbounded = model_ops.routed_experts(layer, x, (weights, ids, None), moe_config(swiglu_limit=None))
        bounded = model_ops.routed_experts(layer, x, (weights, ids, None), moe_config())
        scale = bounded.abs().max()
        assert (stock - unbounded).abs().max() <= 64 * U * self.D * scale < (stock - bounded).abs().max()


class TestWidenBf16Parameters:
    def model(self):
        model = torch.nn.ModuleDict({"wo_a": torch.nn.Linear(8, 4, bias=False).bfloat16(), "wo_b": torch.nn.Linear(4, 8)})
        return model.requires_grad_(False)

    def test_widens_exactly_and_in_place(self):
        model = self.model()
        parameter = model["wo_a"].weight
        before = parameter.clone()
        assert model_ops.widen_bf16_parameters(model, torch.float32) == ["wo_a.weight"]
        assert model["wo_a"].weight is parameter and parameter.dtype == torch.float32
        assert torch.equal(parameter.bfloat16(), before) and torch.equal(parameter, before.float())
        assert model_ops.widen_bf16_parameters(model, torch.float32) == []

    def test_leaves_a_bf16_model_alone(self):
        model = self.model()
        assert model_ops.widen_bf16_parameters(model, torch.bfloat16) == []
        assert model["wo_a"].weight.dtype == torch.bfloat16

    def test_refuses_a_dtype_that_cannot_hold_bf16(self):
        with pytest.raises(UnsupportedError, match="float16"):
            model_ops.widen_bf16_parameters(self.model(), torch.float16)
