import pytest
import torch

from sparsemoe.models.vyra import Codec, CodecConfig
from sparsemoe.models.vyra.layers import CausalConv
from sparsemoe.train.task import CodecTask
from tests.tiny_codec import tiny_codec, tiny_codec_run

RATIOS = [2, 4, 8, 16]


def make(config: CodecConfig, batches: int = 4) -> Codec:
    """In eval mode, its codebooks set by k-means."""
    torch.manual_seed(0)
    codec = Codec(config)
    codec.set_codebooks(tokens_of(8, config.context, seed) for seed in range(batches))
    return codec.eval()


def trained() -> Codec:
    """One that gets many bytes right, not all."""
    torch.manual_seed(0)
    codec = Codec(tiny_codec())
    optimizer = torch.optim.Adam(codec.parameters(), lr=1e-2)
    for step in range(200):
        if step == 100:
            codec.set_codebooks(patterns(16, 64, seed) for seed in range(4))
        optimizer.zero_grad()
        codec(patterns(16, 64, step))[0].backward()
        optimizer.step()
    return codec.eval()


def patterns(batch: int, length: int, seed: int) -> torch.Tensor:
    """Patches of 8 bytes that rise evenly, of 9 bits each."""
    drawn = tokens_of(batch, length // 4, seed).view(batch, -1, 2)
    start, step = drawn[..., :1] % 64, drawn[..., 1:] % 8
    return (64 + start + step * torch.arange(8)).flatten(1)


def tokens_of(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def changed_from(tokens: torch.Tensor, position: int) -> torch.Tensor:
    changed = tokens.clone()
    changed[:, position:] = (changed[:, position:] + 7) % 256
    return changed


@pytest.mark.parametrize("ratio", RATIOS)
@torch.no_grad()
def test_codes_do_not_depend_on_later_patches(ratio):
    codec = make(tiny_codec(compression_ratio=ratio, context=128, encoder_layers=2))
    tokens, patch = tokens_of(4, 128), 128 // ratio // 2
    changed = changed_from(tokens, patch * ratio)
    before, after = codec.encoder(tokens), codec.encoder(changed)
    torch.testing.assert_close(before[:, :patch], after[:, :patch], rtol=1e-5, atol=1e-5)
    assert ((before[:, patch] - after[:, patch]).abs().amax(-1) > 1e-3).all()
    codes = codec.encode(tokens), codec.encode(changed)
    assert torch.equal(codes[0][:, :patch], codes[1][:, :patch])
    assert not torch.equal(codes[0][:, patch:], codes[1][:, patch:])


def test_searched_codes_decode_better_and_do_not_depend_on_later_patches():
    codec, tokens = trained(), patterns(4, 64, 1000)
    wrong = [(codec.decode(codec.encode(tokens, n)).argmax(-1) != tokens).sum() for n in (0, 8)]
    assert 0 < wrong[1] < 0.9 * wrong[0]
    codes = codec.encode(tokens, tries=8)
    assert torch.equal(codes, codec.encode(tokens.int(), tries=8))
    changed = codec.encode(changed_from(tokens, 32), tries=8)
    assert torch.equal(codes[:, :4], changed[:, :4]) and not torch.equal(codes, changed)


def test_a_negative_number_of_tries_is_refused():
    with pytest.raises(ValueError, match="tries must be 0 or more, got -1"):
        make(tiny_codec()).encode(tokens_of(1, 64), tries=-1)


@pytest.mark.parametrize("ratio", RATIOS)
@torch.no_grad()
def test_codes_depend_on_every_byte_of_their_patch_and_on_earlier_ones(ratio):
    codec = make(tiny_codec(compression_ratio=ratio))
    tokens, patch = tokens_of(1, 64), 2
    before = codec.encoder(tokens)
    for position in range((patch + 1) * ratio):
        other = tokens.clone()
        other[:, position] = (other[:, position] + 7) % 256
        moved = (codec.encoder(other) - before)[0].abs().amax(-1)
        assert moved[patch] > 1e-4, position
        assert (moved[: position // ratio] < 1e-5).all(), position


@pytest.mark.parametrize("ratio", RATIOS)
@torch.no_grad()
def test_bytes_do_not_depend_on_codes_of_later_patches(ratio):
    codec = make(tiny_codec(compression_ratio=ratio, context=128, decoder_layers=2))
    codes, patch = codec.encode(tokens_of(4, 128)), 128 // ratio // 2
    changed = codes.clone()
    changed[:, patch:] = (changed[:, patch:] + 5) % codec.config.codebook_size
    before, after = codec.decode(codes), codec.decode(changed)
    border = patch * ratio
    torch.testing.assert_close(before[:, :border], after[:, :border], rtol=1e-5, atol=1e-5)
    moved = (before - after)[:, border : border + ratio].abs().amax(-1)
    assert (moved > 1e-3).all()


@pytest.mark.parametrize("ratio", RATIOS)
@torch.no_grad()
def test_a_sequence_may_be_cut_short(ratio):
    """What streaming needs: the codes and bytes of a beginning are those of the whole."""
    codec = make(tiny_codec(compression_ratio=ratio))
    tokens, part = tokens_of(2, 64), 3 * ratio
    codes = codec.encode(tokens)
    assert torch.equal(codec.encode(tokens[:, :part]), codes[:, :3])
    torch.testing.assert_close(
        codec.decode(codes[:, :3]), codec.decode(codes)[:, :part], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_causal_conv_is_a_convolution(stride):
    conv = CausalConv(3, 5, stride)
    x = torch.randn(2, 8, 3)
    weight = conv.proj.weight.view(5, 3, 3).transpose(1, 2)  # [out, in, kernel]
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3 - stride, 0))
    expected = torch.nn.functional.conv1d(padded, weight, conv.proj.bias, stride)
    torch.testing.assert_close(conv(x), expected.transpose(1, 2))


@pytest.mark.parametrize("ratio", RATIOS)
def test_shapes(ratio):
    codec = make(tiny_codec(compression_ratio=ratio))
    codes = codec.encode(tokens_of(3, 48))
    assert codes.shape == (3, 48 // ratio, 2) and codes.dtype == torch.int32
    assert codec.decode(codes).shape == codec.decode(codes[..., :1]).shape == (3, 48, 256)
    loss, aux = codec(tokens_of(3, 48))
    assert loss.shape == aux["cross_entropy"].shape == aux["correct"].shape == ()
    assert aux["code_counts"].shape == (2, 32)
    assert aux["code_counts"].sum(1).tolist() == [3 * 48 // ratio] * 2


@pytest.mark.parametrize("shape", [(2, 63), (2, 4), (2, 72), (2, 0), (64,)])
def test_lengths_that_do_not_fit_are_refused(shape):
    codec = Codec(tiny_codec())
    message = r"tokens must have shape \[batch, length\], length a multiple of 8 from 8 to 64, got"
    for call in (codec, codec.encode):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape, dtype=torch.long))


def test_loss_and_aux_are_those_of_encode_and_decode():
    codec, tokens = make(tiny_codec(commitment_weight=0.5)), tokens_of(2, 64)
    loss, aux = codec(tokens)
    logits = codec.decode(codec.encode(tokens))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(aux["cross_entropy"], nats)
    assert aux["correct"].item() == (logits.argmax(-1) == tokens).sum().item()
    torch.testing.assert_close(loss, nats + 0.5 * aux["commitment_loss"])
    latents = codec.encoder(tokens)
    codes = codec.encode(tokens).long()
    residual, errors = latents, 0.0
    for stage, codebook in enumerate(codec.quantizer.codebooks):
        residual = residual - codebook[codes[..., stage]]
        errors = errors + residual.square().mean()
    torch.testing.assert_close(aux["commitment_loss"], errors)


def test_latents_have_unit_scale():
    latents = make(tiny_codec()).encoder(tokens_of(2, 64))
    torch.testing.assert_close(latents.square().mean(-1), torch.ones(2, 8), rtol=1e-4, atol=1e-4)


def test_first_loss_is_that_of_a_uniform_guess():
    aux = make(tiny_codec())(tokens_of(4, 64))[1]
    assert aux["cross_entropy"].item() == pytest.approx(5.545, abs=0.15)  # log 256


@pytest.mark.parametrize("quantizing", [False, True])
def test_every_parameter_gets_a_gradient(quantizing):
    codec = make(tiny_codec()).train() if quantizing else Codec(tiny_codec())
    codec(tokens_of(8, 64))[0].backward()
    without = [n for n, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_latents_pass_until_codebooks_are_set():
    codec, tokens = Codec(tiny_codec()), tokens_of(4, 64)
    before = codec.quantizer.codebooks.clone()
    loss, aux = codec(tokens)
    logits = codec.decoder(codec.encoder(tokens))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss, nats)
    assert torch.equal(codec.quantizer.codebooks, before) and "code_counts" not in aux
    codec.set_codebooks([tokens, tokens_of(4, 64, seed=2)])
    assert not torch.equal(codec.quantizer.codebooks, before)
    assert "code_counts" in codec(tokens)[1]
    other = Codec(tiny_codec())
    other.load_state_dict(codec.state_dict())
    assert other.quantizing and not Codec(tiny_codec()).quantizing


def test_codebooks_move_in_training_alone():
    codec, tokens = make(tiny_codec()), tokens_of(4, 64)
    before = codec.quantizer.codebooks.clone()
    codec(tokens)
    codec.train().encode(tokens)
    assert torch.equal(codec.quantizer.codebooks, before)
    codec(tokens)
    assert not torch.equal(codec.quantizer.codebooks, before)


def test_quantizer_dropout_counts_the_stages_in_use():
    codec = make(tiny_codec(quantizer_dropout=0.9, num_quantization_stages=4)).train()
    used = set()
    for step in range(40):
        counts = codec(tokens_of(1, 64), step)[1]["code_counts"]
        assert counts.shape == (4, 32)
        used.add(tuple((counts.sum(1) > 0).tolist()))
    assert used == {tuple(i < n for i in range(4)) for n in range(1, 5)}


def test_dead_codes_are_those_below_a_share_of_the_mean():
    codec = make(tiny_codec(dead_code_share=0.25)).train()
    codec(tokens_of(4, 64))
    assert codec.quantizer.dead_code_threshold == 0.25 * 4 * 8 / 32


def test_bfloat16_autocast_leaves_the_quantizer_in_float32():
    codec, tokens = make(tiny_codec()), tokens_of(8, 64)
    expected, logits = codec.encode(tokens), codec.decode(codec.encode(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        latents, codes = codec.encoder(tokens), codec.encode(tokens)
        approximate = codec.decode(expected)
        loss, _ = codec.train()(tokens)
    loss.backward()
    assert latents.dtype == codec.quantizer.codebooks.dtype == torch.float32
    assert codes.dtype == torch.int32 and approximate.dtype == torch.bfloat16
    assert (codes == expected).float().mean() > 0.8
    assert (approximate - logits).abs().mean() < 0.05
    assert all(p.grad.isfinite().all() for p in codec.parameters() if p.grad is not None)


def test_compiled_blocks_agree(monkeypatch):
    """With a backend that needs no compiler; the trainer's is the default."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: compile_(self, backend="eager", fullgraph=True),
    )
    config = tiny_codec_run({"encoder_layers": 2, "decoder_layers": 2})
    codec, tokens = make(config.model), tokens_of(2, 64)
    loss, aux = codec(tokens)
    names = list(codec.state_dict())
    compiled_loss, compiled_aux = CodecTask(config).compiled(codec)(tokens)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_aux, aux)
    assert list(codec.state_dict()) == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compression_ratio": 3}, "compression_ratio is 3; it must be 2, 4, 8 or 16"),
        ({"context": 60}, r"context is 60; it must be a multiple of compression_ratio \(8\)"),
        ({"hidden_size": 34}, "hidden_size is 34; it must be a multiple of twice"),
        ({"codebook_size": 0}, "codebook_size is 0; it must be 1 or more"),
        ({"codebook_decay": 1.0}, r"codebook_decay is 1.0; it must be in \[0, 1\)"),
        ({"unquantized_steps": -1}, "unquantized_steps is -1"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_codec(**changes)


def test_sizes_of_the_config():
    config = CodecConfig()
    assert (config.patches, config.num_strided, config.max_code_bits) == (1024, 3, 5.0)
