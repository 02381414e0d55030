"""Features of a backbone as pictures, arrays and numbers, in one basis for all inputs."""
