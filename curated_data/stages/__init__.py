"""The stages of a curation: what each is made from, and how it is named, built, opened and checked.

`index`, `embeddings`, `near_duplicates`, `tree` and `selection` are a file each. `curate`, `extend`,
`recurate`, `plan` and `reopen` put them together. A stage between two others takes the names of what it is
made from as its `inputs`, and adds its own name to those of the stages after it.
"""
