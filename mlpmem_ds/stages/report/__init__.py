"""What a person reads of an evaluation; nothing here runs a model. Read in this order:

- `summary.py`: log-probabilities of the arms → figures: λ is chosen on the tuning split, the rest follows
- `breakdowns.py`: where an arm wins and loses, and whether its probabilities mean what they say
- `table.py`: the table of the arms, and what each of its columns means
- `page.py`: `report.md`
- `plots.py`: its plots
- `in_words.py`: what was found, in a sentence
- `words.py`: how numbers are written
"""
