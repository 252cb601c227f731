"""Operations around attention, one a file, each with an eager torch reference that runs anywhere."""
