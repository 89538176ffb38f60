"""Benchmark `quality`: is the memory worth its parameters? From text to a table, with controls and seeds.

- `quality`: the flags; runs a preset, writes quality.json and the page
- `presets`: what tiny, small and real read and train, and what that costs
- `arms`: the trained arms by name, and the flags in which they differ
- `plan`: a preset as a list of jobs and reports
- `jobs`: runs the jobs, some at a time, and continues what was killed; `children`: the processes they run in
- `figures`: the reports of all seeds as rows of tables
- `bootstrap`: intervals over documents and over seeds
- `ratios`: the ratios with their goals
- `results`: quality.json as records; `joined`: those of other seeds in one
- `page`, `plots`: docs/RESULTS.md and its figures, from the JSON of all presets;
  `preset_section`: what it says of one; `markdown`: its paragraphs, items and commands
"""
