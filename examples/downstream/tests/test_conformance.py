import peftcheck


@peftcheck.parametrize("mylib.port:MyLibrary", ledger="ledger.toml")
def test_conformance(check):
    check()
