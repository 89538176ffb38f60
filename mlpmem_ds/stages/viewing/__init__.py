"""`view_report`: a report and some text, token by token → one HTML file that needs nothing else.

Read in this order:
    config       the flags
    view_report  `run`: which passages, and where the page goes
    token_views  what base and memory say of each token of a text; for `generate --html` too
    generated    the same of prompts and what was generated
    html         the page: figures, tables, passages with what is shown when a token is pointed at
"""
