"""Many ranks as a one-process program: a rank is an element of a list, a collective a function of lists.

In the order in which to read:

    ledger, collectives        what ranks send each other, and how it is counted
    stage                      the ranks of a pipeline stage and their groups
    tensor, norms, vocabulary  tensor slicing: layers, norms over all heads, both ends of the model
    experts, expert_slices,    expert parallelism: routing to and from the ranks that hold experts, slices of experts,
    exchange                   three ways to exchange rows
    schedule, timeline,        the pipeline: who works on what when, how long that takes, and doing it
    pipeline
    ranks, job, generation,    all of it together: what each rank holds, a model that runs, and a `Decoder`
    path
"""
