from tlcapture.cli.main import main

main()
