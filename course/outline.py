"""What a solution may not change. A starter holds the outline of its files, and its tests compare a solution with that."""

import ast


def outline(source):
    """What a file defines: functions with their arguments and whether their body shares their line; imports and constants."""
    names = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)):
            names[ast.unparse(node)] = "outside of every body"
        for part in (node, *(node.body if isinstance(node, ast.ClassDef) else ())):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                names[part.name] = ast.unparse(part.args) if isinstance(part, ast.FunctionDef) else "a class"
                names[part.name] += "; one line" * (part.body[0].lineno == part.lineno)
    return names
