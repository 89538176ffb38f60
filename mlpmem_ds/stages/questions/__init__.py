"""`answer_questions`: question sets answered by the base, with its memory, by controls, and with passages.

- `answer_questions`: the command: opens models and questions, shares the units, writes the table; `config`:
  its flags
- `arms`: which models answer, and which prompt each gets
- `passages`: the corpus cut into passages, indexed, found and put before a question
- `lengths`: whether answers and choices fit into what a model reads
- `answering`: one question and one model → an answer, or the choices' log-probabilities, with the time
- `answer_scores`: exact match, F1, contains; `results`: means, paired intervals, speeds, the table
"""
