# SPDX-License-Identifier: Apache-2.0
"""The subjects of MMMU, and the disciplines they belong to.

Of https://github.com/MMMU-Benchmark/MMMU, `eval/data_utils.py`.
"""

# In the order of the official CAT_SHORT2LONG, in which options are drawn.
SUBJECTS = (
    'Accounting',
    'Agriculture',
    'Architecture_and_Engineering',
    'Art',
    'Art_Theory',
    'Basic_Medical_Science',
    'Biology',
    'Chemistry',
    'Clinical_Medicine',
    'Computer_Science',
    'Design',
    'Diagnostics_and_Laboratory_Medicine',
    'Economics',
    'Electronics',
    'Energy_and_Power',
    'Finance',
    'Geography',
    'History',
    'Literature',
    'Manage',
    'Marketing',
    'Materials',
    'Math',
    'Mechanical_Engineering',
    'Music',
    'Pharmacy',
    'Physics',
    'Psychology',
    'Public_Health',
    'Sociology',
)
DISCIPLINES = {
    'Art and Design': ('Art', 'Art_Theory', 'Design', 'Music'),
    'Business': ('Accounting', 'Economics', 'Finance', 'Manage', 'Marketing'),
    'Science': ('Biology', 'Chemistry', 'Geography', 'Math', 'Physics'),
    'Health and Medicine': (
        'Basic_Medical_Science',
        'Clinical_Medicine',
        'Diagnostics_and_Laboratory_Medicine',
        'Pharmacy',
        'Public_Health',
    ),
    'Humanities and Social Science': (
        'History',
        'Literature',
        'Sociology',
        'Psychology',
    ),
    'Tech and Engineering': (
        'Agriculture',
        'Architecture_and_Engineering',
        'Computer_Science',
        'Electronics',
        'Energy_and_Power',
        'Materials',
        'Mechanical_Engineering',
    ),
}
