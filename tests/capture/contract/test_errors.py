import inspect

from bhlog.capture.contract import errors


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    drawn, above = [], []
    for line in errors.__doc__.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name not in vars(errors):
            continue
        depth = (len(line) - len(line.lstrip())) // 4
        above[depth:] = [name]
        drawn.append((name, above[depth - 1] if depth else "Exception"))
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    assert sorted(drawn) == sorted((c.__name__, c.__bases__[0].__name__) for c in classes)


def test_an_error_of_files_is_one_of_python_too():
    assert issubclass(errors.InvalidOption, ValueError)
    assert issubclass(errors.MissingRun, FileNotFoundError)
    assert issubclass(errors.RunExists, FileExistsError)
    assert issubclass(errors.MissingExtra, ImportError)


def test_a_strangers_text_is_one_short_line():
    assert errors.one_line("a\nb\x1b[31m" + "x" * 1000, 10) == r"a\nb\x1b[31mxx"


def test_an_errors_text_is_one_line_whatever_it_tells():
    told = errors.InvalidOption("run\x1b[2J: Invalid data\nDeserializing failed.\r\n (naïve)\n")
    assert str(told) == "run\\x1b[2J: Invalid data Deserializing failed. (naïve)"
