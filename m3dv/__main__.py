"""`python -m m3dv train …` is `m3dv_train …`"""
import os, sys

if __name__=='__main__':
    if not sys.flags.safe_path and sys.path[0]==os.getcwd(): del sys.path[0]           # the current folder may hold anybody's files
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))       # where workers find this m3dv, installed or not
    from m3dv.cli import main
    main()
