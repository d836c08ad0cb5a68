"""The Triton kernel of the low-rank products on a GPU: x Aᵀ and B in one launch, read through the table of pages.

After Punica's and S-LoRA's (Chen et al., 2023; Sheng et al., 2023): tokens of many adapters in one launch, each block
of tokens by the pages of its own row. Other than theirs the two products are not apart: x Aᵀ stays in registers.
"""

# Triton reads the annotations of constants alone: the types of tensors and numbers are those of a launch.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _add_ranks(
    x,
    a,
    b,
    output,
    pages,
    scales,
    num_pages,
    num_tokens,
    page_width,
    fan_in,
    fan_out,
    first_out,
    last_out,
    RANKS: tl.constexpr,
    PAGE_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Add the products of up to RANKS ranks to outputs first_out to last_out of a block of tokens."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    ranks = tl.arange(0, RANKS)
    is_token = (tokens < num_tokens)[:, None]
    is_rank = ranks < num_pages * PAGE_RANK
    # Pages of a large bank are billions of elements apart.
    page = tl.load(pages + ranks // PAGE_RANK, mask=is_rank, other=0).to(tl.int64) * page_width
    scale = tl.load(scales + ranks // PAGE_RANK, mask=is_rank, other=0.0)
    a_rows = a + page + (ranks % PAGE_RANK) * fan_in
    b_rows = b + page + (ranks % PAGE_RANK) * fan_out
    down = tl.zeros((BLOCK_TOKENS, RANKS), tl.float32)
    for start in range(0, fan_in, BLOCK_IN):
        ins = start + tl.arange(0, BLOCK_IN)
        is_in = ins < fan_in
        own = tl.load(x + tokens[:, None] * fan_in + ins[None, :], mask=is_token & is_in[None, :], other=0.0)
        weights = tl.load(a_rows[None, :] + ins[:, None], mask=is_in[:, None] & is_rank[None, :], other=0.0)
        down = tl.dot(own, weights, down, input_precision="ieee")
    scaled = (down * scale[None, :]).to(x.dtype.element_ty)
    for start in range(first_out, last_out, BLOCK_OUT):
        outs = start + tl.arange(0, BLOCK_OUT)
        is_out = outs < last_out
        weights = tl.load(b_rows[:, None] + outs[None, :], mask=is_rank[:, None] & is_out[None, :], other=0.0)
        change = tl.dot(scaled, weights, input_precision="ieee")
        place = output + tokens[:, None] * fan_out + outs[None, :]
        is_place = is_token & is_out[None, :]
        before = tl.load(place, mask=is_place, other=0.0).to(tl.float32)
        tl.store(place, (before + change).to(x.dtype.element_ty), mask=is_place)


@triton.jit(
    do_not_specialize=["tokens_per_row", "blocks_per_row", "num_splits"],
    do_not_specialize_on_alignment=["table", "pages", "scales"],
)
def add_pages(
    x,
    table,
    pages,
    scales,
    slab,
    output_0,
    output_1,
    output_2,
    a_start,
    b_start_0,
    b_start_1,
    b_start_2,
    fan_in,
    fan_out_0,
    fan_out_1,
    fan_out_2,
    page_width,
    tokens_per_row,
    blocks_per_row,
    num_splits,
    PAGE_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Add to each touched row's outputs what its adapters make of its x.

    Programs: (blocks of tokens of all rows of `table`, layers of the group, `num_splits` parts of their outputs). x
    [tokens, fan_in] and the outputs [tokens, fan_out] are contiguous; `slab` [pages, page_width] holds the layers' A
    from `a_start` and their B from `b_start` on. `table` [rows, 4]: the row's first token, as a multiple of
    `tokens_per_row`; its tokens, -1 for `tokens_per_row`; the first of its entries in `pages` and `scales`, and their
    number, 0 for a row without adapters.
    """
    entry = table + tl.program_id(0) // blocks_per_row * 4
    first_token = tl.load(entry).to(tl.int64) * tokens_per_row
    own_tokens = tl.load(entry + 1)
    num_tokens = tl.where(own_tokens < 0, tokens_per_row, own_tokens)
    first_page = tl.load(entry + 2)
    num_pages = tl.load(entry + 3)
    skipped = tl.program_id(0) % blocks_per_row * BLOCK_TOKENS
    first_token += skipped
    num_tokens -= skipped
    member = tl.program_id(1)
    output, b_start, fan_out = output_0, b_start_0, fan_out_0
    if member == 1:
        output, b_start, fan_out = output_1, b_start_1, fan_out_1
    if member == 2:
        output, b_start, fan_out = output_2, b_start_2, fan_out_2
    x += first_token * fan_in
    output += first_token * fan_out
    a = slab + a_start + member * PAGE_RANK * fan_in
    b = slab + b_start
    split = tl.cdiv(tl.cdiv(fan_out, BLOCK_OUT), num_splits) * BLOCK_OUT
    first_out = tl.program_id(2) * split
    last_out = tl.minimum(first_out + split, fan_out)
    pages += first_page
    scales += first_page
    # A row of a table that stays in place may have no pages.
    if num_tokens > 0 and num_pages > 0:
        # As few ranks at once as the row has: the tensor cores multiply padding like anything else.
        if num_pages <= 2:
            _add_ranks(
                x, a, b, output, pages, scales, num_pages, num_tokens, page_width, fan_in, fan_out, first_out, last_out,
                16, PAGE_RANK, BLOCK_TOKENS, BLOCK_IN, BLOCK_OUT,
            )  # fmt: skip
        else:
            for page in range(0, num_pages, 4):
                _add_ranks(
                    x, a, b, output, pages + page, scales + page, num_pages - page, num_tokens, page_width, fan_in,
                    fan_out, first_out, last_out, 32, PAGE_RANK, BLOCK_TOKENS, BLOCK_IN, BLOCK_OUT,
                )  # fmt: skip
                # The next ranks are added to what these have stored.
                tl.debug_barrier()
