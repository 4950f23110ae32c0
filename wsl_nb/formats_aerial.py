DIOR_WORDS={'storagetank':'storage tank','golffield':'golf course','Expressway-Service-area':'expressway service area'}
