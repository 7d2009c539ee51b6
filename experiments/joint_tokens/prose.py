"""What docs/joint_tokens.md says around its tables, pictures and verdicts."""

DIGITS = """## Black and white digits

![nll@L against passes for every head, and the floor of products of tokens]({images}/quality.png)

Masked diffusion over 64 pixels, no classes. Of each seed all heads start from one net, trained for {before:,} steps
with the product head at any number of visible tokens (formula 4), and go on for samplers of {trained} steps, one drawn
for each sample. nll@L is the mean of -log q of what a sampler of L passes draws, in random order and equal steps, on
held-out digits: of one pass it is the head's own word on all 64 pixels. The recipe was chosen with one seed by a
quarter of the training digits, left out of training for that, and not by the digits measured here; an earlier recipe,
from which that search began, was. Two criteria (the floor below the autoregressive head, the error of formula 1) are
not as they were first put: see [the log](log.md).

{protocol}

Nats a sequence, mean and standard deviation over training seeds:

{nll}

The uniform-conditioned head draws by a student that was taught by an autoregressive head; its numbers are a bound, the
teacher's nats and the student's together, for what it draws has no likelihood in closed form. The autoregressive head
calls its own small transformer once a token within a pass of the net; all others draw a step at once. In training a
joint head scores the masked tokens as disjoint sets of a step's size, the product head token by token (formula 5).

What the information profile of the net with the product head says that drawing pixels independently costs (formula 1 in
[the mathematics](mathematics.md#tokens)): nats a sequence above one pixel a pass, in equal steps, in those of a cosine,
and in the best ones, which are chosen by one half of all held-out digits and measured on the other. From few to many
visible pixels this profile falls nearly along a line, and along a line equal steps are the best ones:

{sizes}

Differences of neighbouring heads in nats a sequence by seed, with standard errors over the same samples; which of
mixture and chain is ahead was not foretold:

{gaps}

{claims}

![Digits drawn by each head]({images}/samples.png)"""

MNIST = """## Larger digits: how many pixels a step

![A profile with equal and best steps, and what equal, cosine and best sizes cost]({images}/sizes.png)

The central 20 x 20 pixels of MNIST, the product head, formula 4. Here the profile bends: the first pixels say which
digit it is and where, the last ones lie between their neighbours. Steps that are small at first and large at the end
lose less, and the profile says how small and how large (recursion 3). Nats a sequence above one pixel a pass, {alone},
as predicted from the profile on the half of the held-out digits that did not choose the sizes:

{sizes}

{protocol}

{claims}

Drawn by the net of the first seed in equal steps and in the sizes that all held-out digits choose ({listed}):

![Digits of equal and of best steps]({images}/sizes_samples.png)"""

KJV = """## Verses

A causal net that predicts the next 4 of 27 letters at every place (`method.name=next_block`). Nats of the last block,
of four letters after 24; the dependence is what the autoregressive head has less than the product head; "verified" is
speculative decoding by the net's own blocks, whose law is that of one letter at a time. It draws at most 4
letters a pass.

{protocol}

{blocks}

{claims}"""

HANDS = """## Four hands

Two words that name one of four hands of cards, "high card", "two pair", "full house", "straight flush": a product that
draws both at once is right one time in four. All pairs are enumerated.

{protocol}

{table}

{claims}"""

SCALING = """## Size and compute

![Nats a letter against training compute]({images}/scaling.png)

Causal nets for the next letter, `imm-scale sweep submit kjv_scaling` (`configs/sweep/kjv_scaling.yaml`): four sizes at
four budgets, one seed, the largest budget kept out of the fit of L(N, D) and predicted, {minutes:.0f} minutes of
training.

{table}

{claims}"""

PAGE = """# Joint heads: what a pass over tokens can draw

Written by `python -m experiments.joint_tokens`; every figure and every verdict is read from the runs it makes.

A masked or a causal net that predicts several tokens at once and draws each by itself draws from a product, however it
is trained: the dependence between the tokens of a step is lost, and how much of it is known beforehand from one
held-out pass. A head that draws them jointly has no such floor. Here all heads sit on the same small net, with the same
samples, order and draws, and are compared by nll@L, a likelihood of what the sampler draws, on the same held-out
sequences. The nets are tiny and briefly trained; their likelihoods are no records. All runs took {minutes:.0f} minutes
of training and measuring by the clock, added up over runs of one core each.

{sections}
"""
