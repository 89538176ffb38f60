"""Side-by-side measurements for `bench NAME`: what we do, next to the obvious other way to do it.

    bench               reads NAME and runs the benchmark of that name
    common              what all share: interleaved timing, peak memory of one arm, the JSON report
    corpus              prepare_corpus against the bare tokenizer
    extract             extraction of keys against the bare forward pass
    index               exact and list search, and building an index, against faiss
    targets             targets against the published recipe; published_targets is that recipe, and
                        target_fidelity says how far both are from exact search
    loss                the memory's loss against dense ones; loss_gpu has the rows of a CUDA device
    train               a training step against the published loop
    evaluate            perplexities over a grid of λ against dense mixtures
    decode              time to the first token and tokens a second, against kNN and RAG
    goodput             a training and targets under kill -9; kills does the killing
    plan                what `plan` says against what a run takes; hashing_cost counts what checksums take
    quality             is the memory worth its parameters: all arms, several seeds, docs/RESULTS.md
    sweep               when what wins: epochs, size of the text, quality of the base
    scaling             power laws of perplexity over parameters and compute (tools/fit_scaling.py)
    scale               what grows with ranks, keys and positions, counted at a cluster's sizes
    fuzz                files of every kind, damaged at random (tools/fuzz_readers.py); no measurement
    gpu_check           all that needs a GPU, on a machine that has some (tools/gpu_check.sh)
    result_files        results of quality, scaling and sweep as JSON
    made_up_corpus      random tokens that a base reads
    made_up_keys        keys that stand in for real ones in speed, and not in fidelity

Each module has a `Config`, its arms, and `run(config, world)`. They may import any library, as its users do.
"""
