"""`python -m dinat`: the command line `dinat`."""

from dinat.commands import main

main()
