"""`python -m m3dv train …` is `m3dv_train …`"""
from m3dv.cli import main

if __name__=='__main__': main()
